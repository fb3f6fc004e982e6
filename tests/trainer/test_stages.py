"""What each stage trains, and what it leaves alone (invariant 2)."""

import copy

import pytest
import torch
from safetensors import safe_open
from tiny import safe_model, tiny_llava

from safevlm import SafeVlmForConditionalGeneration
from safevlm.trainer.stage.checkpoints import save_atomically
from safevlm.trainer.stage.lora import add_lora
from safevlm.trainer.stage.stage_model import StageModel, set_trainable

# What no training row can reach: the token for pairs without a question, and attention biases that softmax cancels.
UNREACHED = {"safety.head.no_question.weight"}
CANCELLED = ("key.bias", "pooling_score.bias")

LANGUAGE_MODEL = ("base.model.language_model.", "base.lm_head.")


@pytest.fixture
def stage(make_trainer):
    """`stage(model, rows, **arguments)`: the model after a stage."""

    def train(model, rows, **changes):
        trainer = make_trainer(model, rows, **changes)
        trainer.train()
        return trainer.model

    return train


@pytest.fixture
def trained(stage, rows):
    """`trained(model, **arguments)`: the model after a stage, with its weights before."""

    def train(model, **changes):
        before = copy.deepcopy(model.state_dict())
        changes = {"max_steps": 3, "per_device_train_batch_size": 4, "hint_probability": 0.5, **changes}
        return before, stage(model, rows, **changes)

    return train


def learnable(names) -> set[str]:
    return {n for n in names if n.startswith("safety.") and n not in UNREACHED and not n.endswith(CANCELLED)}


def test_stage_one_leaves_the_base_bitwise_unchanged_and_trains_every_safety_module(fresh_model, trained, differing):
    model = fresh_model()
    before, after = trained(model, stage="safety_alignment", weight_decay=0.1)
    changed = differing(before, after.state_dict())
    assert not {name for name in changed if name.startswith("base.")}
    assert learnable(before) <= changed


def test_stage_one_leaves_the_buffers_of_the_base_unchanged(fresh_model, trained):
    model = fresh_model()
    buffers = {name: buffer.clone() for name, buffer in model.base.named_buffers()}
    _, after = trained(model, stage="safety_alignment")
    assert buffers
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in after.base.named_buffers())


def test_stage_one_with_a_resampler_and_without_safety_tokens_trains_them_all(fresh_model, trained, differing):
    before, after = trained(fresh_model(safety_projector_type="resampler"), stage="safety_alignment")
    changed = differing(before, after.state_dict())
    assert learnable(before) <= changed and all(name.startswith("safety.") for name in changed)


@pytest.mark.parametrize("tie", [False, True])
def test_stage_two_in_full_trains_language_model_and_safety_modules_only(processor, trained, differing, tie):
    model = safe_model(tiny_llava(tie=tie), processor)
    before, after = trained(model, stage="joint_finetuning")
    changed = differing(before, after.state_dict())
    assert all(name.startswith((*LANGUAGE_MODEL, "safety.")) for name in changed)
    assert learnable(before) <= changed
    assert {name for name in before if name.startswith(LANGUAGE_MODEL)} <= changed


def test_chosen_parts_train_and_nothing_else(fresh_model, trained, differing):
    before, after = trained(fresh_model(), trainable=["base.model.multi_modal_projector", "safety.head"])
    changed = differing(before, after.state_dict())
    assert changed
    assert all(name.startswith(("base.model.multi_modal_projector.", "safety.head.")) for name in changed)


def test_a_part_that_is_not_there_is_an_error(fresh_model):
    with pytest.raises(ValueError, match="`trainable` names 'langauge_model', which matches no parameter"):
        set_trainable(fresh_model(), ["safety", "langauge_model"])


def test_the_number_of_trainable_parameters_is_returned(fresh_model):
    model = fresh_model()
    assert set_trainable(model, ["safety"]) == sum(p.numel() for p in model.safety.parameters())


def test_a_trained_model_can_be_trained_further(fresh_model, trained):
    _, after = trained(fresh_model(), stage="safety_alignment")
    assert all(parameter.requires_grad for parameter in after.parameters())
    assert not after.training


# -- LoRA -------------------------------------------------------------------------------------------------------------

LORA = dict(stage="joint_finetuning", lora_r=4, lora_alpha=8, lora_dropout=0.1)


def test_lora_is_on_every_linear_layer_of_the_language_model_and_nowhere_else(fresh_model, arguments):
    model = fresh_model()
    linears = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("base.model.language_model.")
    }
    wrapped = add_lora(model, arguments(**LORA))
    names = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    lora = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in names if ".lora_" in name}
    assert lora == linears and len(linears) == 14
    others = {name.removeprefix("base_model.model.") for name in names if ".lora_" not in name}
    safety = {f"safety.modules_to_save.default.{name}" for name, _ in tiny_safety(model).named_parameters()}
    assert others == safety


def tiny_safety(model):
    """The safety modules inside PEFT's wrapper."""
    return model.safety.original_module


def test_stage_two_with_lora_trains_language_model_and_safety_modules_only(fresh_model, trained, differing):
    before, after = trained(fresh_model(), **LORA)
    changed = differing(before, after.state_dict())  # equal names: merged, so no LoRA key is left
    linears = {n for n in before if n.startswith("base.model.language_model.layers.") and n.endswith("_proj.weight")}
    assert {name for name in changed if name.startswith("base.")} == linears
    assert learnable(before) <= changed


def test_lora_without_the_safety_modules_leaves_them_bitwise_unchanged(fresh_model, trained, differing):
    before, after = trained(fresh_model(), **LORA, trainable=["language_model"])
    changed = differing(before, after.state_dict())
    assert changed and all(name.startswith("base.model.language_model.") for name in changed)


def test_lora_has_no_effect_on_a_stage_that_does_not_train_the_language_model(fresh_model, trained, differing):
    before, after = trained(fresh_model(), stage="safety_alignment", lora_r=4)
    assert isinstance(after, SafeVlmForConditionalGeneration)
    assert all(name.startswith("safety.") for name in differing(before, after.state_dict()))


def test_the_merged_model_has_the_adapter_model_s_logits(fresh_model, stage, rows, batch, monkeypatch):
    kept = {}
    end = StageModel.end

    def keep_and_end(self, model, empty=None):
        with torch.no_grad():
            kept["adapter"] = model.eval()(**batch)
        return end(self, model, empty)

    monkeypatch.setattr(StageModel, "end", keep_and_end)
    model = fresh_model()
    with torch.no_grad():
        before = model(**batch).logits
    after = stage(model, rows, max_steps=3, **LORA)
    with torch.no_grad():
        merged = after(**batch)
    for name in ("logits", "safety_level_logits", "safety_category_logits"):
        assert torch.allclose(merged[name], kept["adapter"][name], atol=1e-4), name
    assert not torch.allclose(merged.logits, before, atol=1e-2)


def test_the_merged_checkpoint_is_plain_and_the_adapter_lies_beside_it(
    fresh_model, processor, rows, stage, batch, tmp_path
):
    after = stage(fresh_model(), rows, **LORA)
    save_atomically(after, processor, tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "lora" in key or "modules_to_save" in key]  # noqa: SIM118
    assert (tmp_path / "stage" / "adapter" / "adapter_model.safetensors").is_file()
    loaded = SafeVlmForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).logits, after(**batch).logits, atol=1e-5)


def test_lora_starts_from_the_base_s_outputs(fresh_model, arguments, batch):
    model = fresh_model()
    with torch.no_grad():
        before = model(**batch).logits
        wrapped = add_lora(model, arguments(**LORA)).eval()
        assert torch.allclose(wrapped(**batch).logits, before, atol=1e-5)


def test_lora_without_peft_says_what_to_install(fresh_model, arguments, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"LoRA needs peft: pip install 'safevlm\[train\]'"):
        add_lora(fresh_model(), arguments(**LORA))


def test_a_few_steps_teach_the_head_its_rows(fresh_model, processor, make_row, stage):
    rows = [make_row(0, category=1, level=3), make_row(1, category=6, level=0)]
    model = stage(fresh_model(), rows, max_steps=25)
    prompts = [processor.apply_chat_template(row.messages[:1], add_generation_prompt=True) for row in rows]
    inputs = processor(images=[row.images[0] for row in rows], text=prompts, return_tensors="pt")
    assert model.assess(**inputs).level.tolist() == [3, 0]
