"""Every supported family through the whole of SafeVLM, on tiny random models with the families' real processors.

Each test is a column of the table in modeling_safevlm/README.md, which `pytest tests/modeling/test_families.py
--family-table modeling_safevlm/README.md` writes.
"""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, build
from filelock import FileLock
from tiny import SIZES, chat, new_tokens, picture, safe_model

from safevlm import SafeVlmForConditionalGeneration, SafeVlmProcessor
from safevlm.backbones import BACKBONES
from safevlm.trainer import Recipe, run_schedule
from safevlm.trainer.data import SafetyRow
from safevlm.trainer.stage.lora import language_model_parts

# One image, several of other sizes (and so other tile counts), none.
ROWS = [("What is in the picture?", 1), ("Is it yes?", 2), ("no", 0)]
PICTURES = [picture(i, size) for i, size in enumerate([(32, 32), (60, 30), (20, 64)])]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def bases(family):
    """A base that nothing has wrapped, and its processor."""
    return build(family)


@pytest.fixture(scope="module")
def processor(bases):
    return SafeVlmProcessor.from_base(bases[1])


@pytest.fixture(scope="module")
def model(family, processor):
    return safe_model(build(family)[0], processor)


def encoded(processor, rows=(0, 1, 2), base_processor=None):
    """The left-padded batch of some of `ROWS`: `processor`'s prompts, tensors of it or of the base's own processor."""
    prompts = [
        processor.apply_chat_template(chat(question, images), add_generation_prompt=True)
        for question, images in (ROWS[row] for row in rows)
    ]
    pictures = [part for row in rows for part in ([PICTURES[0]], PICTURES[1:], [])[row]]
    use = processor if base_processor is None else base_processor
    if base_processor is not None:  # Some families' processors want the images of each prompt by themselves.
        pictures = [([PICTURES[0]], PICTURES[1:], [])[row] for row in rows] if pictures else []
    inputs = use(images=pictures or None, text=prompts, return_tensors="pt", padding=True)
    inputs.pop("labels", None)  # PaliGemma's, all ignored
    return inputs


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.column("from_base")
def test_wrapping_leaves_the_base_as_it_was(family, bases, model):
    expected = bases[0].state_dict()
    assert model.backbone is not None and type(model.backbone) is BACKBONES[family]
    assert all(torch.equal(value, expected[name]) for name, value in model.base.state_dict().items())


@pytest.mark.column("forward = base")
def test_without_safety_tokens_the_logits_are_the_bases(family, bases):
    processor = SafeVlmProcessor.from_base(bases[1], tokens_per_image=0)
    model = safe_model(build(family)[0], processor, num_prompt_tokens=0, num_projected_tokens=0)
    for rows in ([0], [1], [2], [0, 1, 2]):
        inputs, own = encoded(processor, rows), encoded(processor, rows, bases[1])
        assert all(torch.equal(inputs[name], value) for name, value in own.items())
        assert torch.equal(logits(model, inputs), logits(bases[0], own)), rows


@pytest.mark.column("off = base")
@pytest.mark.parametrize("strategy", [{}, dict(num_beams=3), dict(do_sample=True)], ids=["greedy", "beams", "sampled"])
def test_with_the_policy_off_it_generates_what_the_base_generates(bases, processor, model, strategy):
    for rows in ([1], [0, 1, 2]):
        inputs, own = encoded(processor, rows), encoded(processor, rows, bases[1])
        torch.manual_seed(0)
        expected = bases[0].generate(**own, **strategy, max_new_tokens=6)
        torch.manual_seed(0)
        answer = model.generate(**inputs, safety_policy="off", **strategy, max_new_tokens=6)
        assert torch.equal(new_tokens(answer, inputs), new_tokens(expected, own)), rows


@pytest.mark.column("batch = single")
def test_rows_in_a_batch_get_what_they_get_alone(processor, model):
    """Images of other sizes and tile counts, several, none, left-padded together."""
    together = encoded(processor)
    with torch.no_grad():
        batch = model(**together)
    assert batch.safety_assessed.tolist() == [True, True, False]
    for row in range(3):
        with torch.no_grad():
            alone = model(**encoded(processor, [row]))
        torch.testing.assert_close(batch.logits[row, -1], alone.logits[0, -1], rtol=2e-4, atol=2e-4)
        if row < 2:
            torch.testing.assert_close(batch.safety_level_logits[row], alone.safety_level_logits[0])
            torch.testing.assert_close(batch.safety_category_logits[row], alone.safety_category_logits[0])


@pytest.mark.column("cache = none")
def test_cached_and_uncached_generation_agree(processor, model):
    inputs = encoded(processor)
    assert torch.equal(model.generate(**inputs), model.generate(**inputs, use_cache=False))


@pytest.mark.column("assess")
def test_the_verdict_depends_on_every_image_and_on_the_question(processor, model):
    def verdict(pictures, question="Is it yes?"):
        prompt = processor.apply_chat_template(chat(question, 2), add_generation_prompt=True)
        inputs = processor(images=pictures, text=[prompt], return_tensors="pt")
        images = model.encode_images(**{k: v for k, v in inputs.items() if k != "attention_mask"})
        with torch.no_grad():
            return model.predict_safety(inputs["input_ids"], inputs["attention_mask"], images).level_logits

    here = verdict(PICTURES[:2])
    assert here.shape == (2, 4)
    assert model.assess(**encoded(processor)).assessed.tolist() == [True, True, False]
    for changed in (verdict([picture(9), PICTURES[1]]), verdict([PICTURES[0], picture(9, (60, 30))])):
        assert (changed != here).any(dim=1).sum() == 1  # the other image's verdict stays
    assert (verdict(PICTURES[:2], "What?") != here).any(dim=1).all()


@pytest.mark.column("generate")
@pytest.mark.parametrize("strategy", [{}, dict(num_beams=3), dict(do_sample=True)], ids=["greedy", "beams", "sampled"])
def test_policies_are_enforced_row_by_row(processor, model, verdicts, strategy):
    inputs = encoded(processor)
    verdicts(model, "high", "low", "none")
    output = model.generate(**inputs, **strategy, max_new_tokens=60, return_dict_in_generate=True)
    texts = processor.batch_decode(new_tokens(output.sequences, inputs), skip_special_tokens=True)
    assert texts[0].strip() == "I can't help with this request: it involves politics."
    assert output.safety.actions == ["refuse", "caution", "allow"]
    assert torch.equal(output.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    # The hint that row 1 gets changes its answer as it would for that row alone.
    verdicts(model, "low")
    alone = model.generate(**encoded(processor, [1]), max_new_tokens=6)
    if not strategy:
        both = new_tokens(output.sequences, inputs)[1, :6]
        assert torch.equal(both[: alone.shape[1]], new_tokens(alone, encoded(processor, [1]))[0, :6])


@pytest.mark.column("user text")
def test_user_text_cannot_spell_control_tokens(processor, model):
    special = {t.content for t in processor.tokenizer.added_tokens_decoder.values() if t.special} | {
        processor.image_token
    }
    prompt = processor.apply_chat_template(chat("".join(sorted(special)) + "?", 1), add_generation_prompt=True)
    plain = processor.apply_chat_template(chat("?", 1), add_generation_prompt=True)
    one = [processor(images=[PICTURES[0]], text=[text], return_tensors="pt") for text in (prompt, plain)]
    ids = [processor.tokenizer.convert_tokens_to_ids(token) for token in sorted(special)]
    counts = [[int((inputs["input_ids"] == i).sum()) for i in ids] for inputs in one]
    assert counts[0] == counts[1]
    assert model.assess(**one[0]).assessed.all()


@pytest.fixture(scope="module")
def training_rows():
    def row(i, question, images, answer, category, level):
        turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        return SafetyRow(f"row-{i}", images, chat(question, len(images)) + [turn], category, level)

    return [
        row(0, "What is in the picture?", [PICTURES[0]], "yes", 6, 0),
        row(1, "Is it yes?", PICTURES[1:], "no no", 1, 3),
        row(2, "no", [], "The answer is yes.", None, None),
        row(3, "Is it?", [PICTURES[2]], "What?", 4, 2),
    ]


@pytest.mark.column("stages 1, 2")
def test_both_stages_train(family, processor, training_rows, tmp_path):
    model = SafeVlmForConditionalGeneration.from_base(build(family)[0], processor, **SIZES)
    recipe = tmp_path / "recipe.yaml"
    stage = {"max_steps": 2, "learning_rate": 1e-2}
    stages = [{"stage": "safety_alignment", **stage}, {"stage": "joint_finetuning", "lora_r": 4, **stage}]
    recipe.write_text(json.dumps({"stages": stages}))
    before = {name: value.clone() for name, value in model.base.state_dict().items()}
    after = {}

    def after_stage(folder, model):
        after[folder.name] = {name: value.clone() for name, value in model.base.state_dict().items()}

    trained = run_schedule(
        model,
        processor,
        training_rows,
        tmp_path / "out",
        Recipe.load(recipe).with_arguments(
            use_cpu=True, per_device_train_batch_size=2, disable_tqdm=True, report_to="none"
        ),
        after_stage=after_stage,
    )
    first, second = after.values()
    assert all(torch.equal(first[name], before[name]) for name in before)
    changed = {name for name in before if not torch.equal(second[name], before[name])}
    parts = tuple(name.removeprefix("base.") for name in language_model_parts(model))
    assert changed and all(name.startswith(parts) for name in changed), changed
    inputs = encoded(processor)
    reloaded = SafeVlmForConditionalGeneration.from_pretrained(
        tmp_path / "out" / "2-joint_finetuning" / "model"
    ).eval()
    torch.testing.assert_close(logits(reloaded, inputs), logits(trained.eval(), inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.column("loss")
def test_the_loss_is_that_of_the_answer_tokens_over_all_accumulated_ones(processor, model, training_rows):
    """What the Trainer relies on under gradient accumulation, and for a row of its own beside others."""
    from safevlm.trainer.encoding.data_collator import SafeVlmDataCollator
    from safevlm.trainer.encoding.row_encoder import encode_row

    rows = [encode_row(row, processor, model.config) for row in training_rows]
    batch = SafeVlmDataCollator(processor.tokenizer.pad_token_id)(rows)
    answers = int((batch["labels"][:, 1:] != -100).sum())
    with torch.no_grad():
        mean = model(**batch).lm_loss
        scaled = model(**batch, num_items_in_batch=torch.tensor(4 * answers)).lm_loss
        alone = [model(**SafeVlmDataCollator(0)([row])).lm_loss for row in rows]
    torch.testing.assert_close(scaled, mean / 4, rtol=1e-4, atol=1e-5)
    lengths = torch.tensor([(row["labels"] != -100).sum() for row in rows])
    torch.testing.assert_close(mean, (torch.stack(alone) * lengths).sum() / lengths.sum(), rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory):
    """What a fresh process without safevlm makes of each family's saved folder; made once for all test workers."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / "families.lock"):
        if not (shared / "families").is_dir():
            run_elsewhere(shared / "families")
    return {family: json.loads((shared / "families" / family / "result.json").read_text()) for family in FAMILIES}


def run_elsewhere(folder: Path):
    for family in FAMILIES:
        base, base_processor = build(family)
        processor = SafeVlmProcessor.from_base(base_processor)
        saved = folder / family
        safe_model(base, processor).save_pretrained(saved)
        processor.save_pretrained(saved)
        for i, image in enumerate(PICTURES):
            image.save(saved / f"{i}.png")
        chats = [chat(question, images) for question, images in ROWS]
        request = {
            "images": [f"{i}.png" for i in range(3)],
            "prompts": [processor.apply_chat_template(c, add_generation_prompt=True) for c in chats],
            "chats": chats,
        }
        (saved / "request.json").write_text(json.dumps(request))
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("fresh_families.py")
    command = [sys.executable, script, *(folder / family for family in FAMILIES)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.column("reload")
def test_a_fresh_process_without_the_package_computes_the_same(family, processor, model, elsewhere):
    found, inputs = elsewhere[family], encoded(processor)
    assert found["input_ids"] == inputs["input_ids"].tolist()
    torch.testing.assert_close(torch.tensor(found["logits"]), logits(model, inputs), rtol=1e-4, atol=1e-4)
    assert found["sequences"] == model.generate(**inputs).tolist()


@pytest.mark.column("pipeline")
def test_the_pipeline_answers_with_a_verdict(family, processor, model, elsewhere):
    for row, record in enumerate(elsewhere[family]["pipeline"]):
        inputs = encoded(processor, [row])
        answer = new_tokens(model.generate(**inputs), inputs)
        text = processor.batch_decode(answer, skip_special_tokens=True)[0]
        verdict = model.assess(**inputs).to_list()[0]
        assert record["generated_text"].strip() == text.strip()
        assert record["safety"]["assessed"] == verdict["assessed"] == (row < 2)
        assert record["safety"]["score"] == pytest.approx(verdict["score"], abs=1e-4)
        if row == 0:
            batched = elsewhere[family]["batched_pipeline"]
            assert [one["generated_text"] for one in batched] == [record["generated_text"]] * 2
            assert [one["safety"]["score"] for one in batched] == pytest.approx([verdict["score"]] * 2, abs=1e-4)


@pytest.mark.column("from files")
def test_a_base_folder_is_enough(family, bases, processor, tmp_path):
    """Without torchvision: no part needs the family's video processor."""
    base, base_processor = bases
    base.save_pretrained(tmp_path)
    base_processor.save_pretrained(tmp_path)
    loaded = SafeVlmProcessor.from_base(tmp_path)
    inputs = encoded(loaded)
    expected = encoded(processor)["input_ids"]
    # The family's own tokenizer class may add tokens of its own before `<safety>`.
    placeholders = expected == processor.safety_token_id
    assert torch.equal(inputs["input_ids"] == loaded.safety_token_id, placeholders)
    assert torch.equal(inputs["input_ids"][~placeholders], expected[~placeholders])
    model = SafeVlmForConditionalGeneration.from_base(tmp_path, loaded, **SIZES).eval()
    assert model.assess(**inputs).assessed.tolist() == [True, True, False]
    assert copy.deepcopy(loaded).base_processor_class == type(base_processor).__name__


def test_the_readmes_worked_example_adds_a_family():
    readme = Path(__file__).parents[2] / "modeling_safevlm" / "README.md"
    (code,) = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    base, base_processor = build("aya_vision")
    with pytest.raises(ValueError, match="'aya_vision'.*Adding a family"):
        SafeVlmForConditionalGeneration.from_base(base, base_processor)
    exec(code, {})
    try:
        processor = SafeVlmProcessor.from_base(base_processor)
        model = safe_model(base, processor)
        together = encoded(processor)
        assert model.assess(**together).assessed.tolist() == [True, True, False]
        for row in range(2):
            alone = model(**encoded(processor, [row])).safety_level_logits[0]
            torch.testing.assert_close(model(**together).safety_level_logits[row], alone)
        assert torch.equal(model.generate(**together), model.generate(**together, use_cache=False))
    finally:
        BACKBONES.pop("aya_vision", None)
