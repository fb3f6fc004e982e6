"""Interrupted training ends with the same weights as the uninterrupted run (invariant 7)."""

import random
import shutil

import numpy as np
import pytest
import torch
from tiny import safe_model, tiny_llava

from safevlm import SafeVlmForConditionalGeneration, SafeVlmProcessor
from safevlm.trainer import Recipe, SafeVlmTrainer, run_schedule
from safevlm.trainer.schedule import check_same_run
from safevlm.trainer.stage.checkpoints import last_complete_checkpoint, save_atomically

# Two shuffled epochs of 4 micro-batches in steps of 2, some rows hinted, some conditioned on their label.
COMMON = dict(
    num_train_epochs=2,
    learning_rate=1e-2,
    warmup_steps=1,
    lr_scheduler_type="cosine",
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    hint_probability=0.5,
    label_conditioning_start=0.7,
    label_conditioning_end=0.3,
    save_strategy="steps",
    save_steps=3,
    use_cpu=True,
    disable_tqdm=True,
)
RECIPES = {
    "full": Recipe([{"stage": "safety_alignment", **COMMON}, {"stage": "joint_finetuning", **COMMON}]),
    "lora": Recipe(
        [
            {"stage": "safety_alignment", **COMMON},
            {"stage": "joint_finetuning", **COMMON, "lora_r": 4, "lora_dropout": 0.2},
        ]
    ),
    "one stage": Recipe([{"stage": "safety_alignment", **COMMON, "save_steps": 1}]),
}


class Killed(BaseException):
    """What no `except Exception` stops, like a signal."""


@pytest.fixture
def killed_at(monkeypatch):
    """`killed_at(n)`: training dies before its n-th micro-batch, counted over all stages; `None`: it does not."""
    training_step = SafeVlmTrainer.training_step

    def kill(micro_batch):
        count = []

        def step(self, *args, **kwargs):
            if len(count) == micro_batch:
                raise Killed
            count.append(self.args.stage)
            return training_step(self, *args, **kwargs)

        monkeypatch.setattr(SafeVlmTrainer, "training_step", step)
        return count

    return kill


def scramble_random_state():
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)


@pytest.fixture(scope="module")
def schedule(processor, rows):
    """`schedule(recipe, folder)`: runs it as a new process would, with whatever random state there is."""

    def run(name, folder, **overrides):
        model = safe_model(tiny_llava(), processor)
        scramble_random_state()
        return run_schedule(model, processor, rows, folder, RECIPES[name].with_arguments(**overrides))

    return run


@pytest.fixture(scope="module")
def uninterrupted(schedule, tmp_path_factory, weights):
    """`uninterrupted(recipe)`: its folder, and the weights it ended with."""
    done = {}

    def run(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            done[name] = folder, weights(schedule(name, folder))
        return done[name]

    return run


@pytest.fixture
def resumed(schedule, killed_at, tmp_path, weights):
    """`resumed(recipe, n, meanwhile=...)`: weights of a run that was killed before micro-batch n and started again."""

    def run(name, micro_batch, meanwhile=lambda folder: None):
        killed_at(micro_batch)
        with pytest.raises(Killed):
            schedule(name, tmp_path)
        meanwhile(tmp_path)
        count = killed_at(None)
        model = schedule(name, tmp_path)
        return weights(model), len(count)

    return run


# A stage is 8 micro-batches, 4 steps; its checkpoint is in the middle of the second epoch, after step 3.
@pytest.mark.parametrize(
    "recipe, micro_batch, left",
    [
        pytest.param("one stage", 1, 8, id="before the first checkpoint"),
        pytest.param("one stage", 3, 6, id="in the first epoch"),
        pytest.param("full", 7, 10, id="inside stage 1"),
        pytest.param("full", 8, 8, id="between the stages"),
        pytest.param("full", 15, 2, id="inside stage 2"),
        pytest.param("lora", 8, 8, id="between the stages, LoRA"),
        pytest.param("lora", 15, 2, id="inside stage 2, LoRA"),
    ],
)
def test_a_killed_run_ends_with_the_weights_of_the_uninterrupted_one(
    uninterrupted, resumed, differing, recipe, micro_batch, left
):
    _, expected = uninterrupted(recipe)
    found, steps = resumed(recipe, micro_batch)
    assert steps == left  # it went on from the last checkpoint
    assert not differing(found, expected)


def test_another_seed_ends_with_other_weights(uninterrupted, schedule, tmp_path, weights, differing):
    _, expected = uninterrupted("one stage")
    assert differing(weights(schedule("one stage", tmp_path, seed=7)), expected)


def remove_state(checkpoint):
    (checkpoint / "trainer_state.json").unlink()


def cut_state(checkpoint):
    state = checkpoint / "trainer_state.json"
    state.write_text(state.read_text()[:50])


@pytest.mark.parametrize("damage", [remove_state, cut_state])
def test_an_incomplete_newest_checkpoint_is_passed_over(uninterrupted, resumed, differing, damage):
    _, expected = uninterrupted("one stage")
    found, steps = resumed(
        "one stage", 7, meanwhile=lambda folder: damage(folder / "1-safety_alignment" / "checkpoint-3")
    )
    assert steps == 4  # from checkpoint-2, not -3
    assert not differing(found, expected)


def test_checkpoints_are_ordered_by_number(tmp_path):
    for number in (9, 10, 100):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text("{}")
        (tmp_path / f"checkpoint-{number}" / "rng_state.pth").touch()
    (tmp_path / "checkpoint-200").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_finished_stages_are_loaded_and_not_trained_again(uninterrupted, schedule, killed_at, weights, differing):
    folder, expected = uninterrupted("full")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    count = killed_at(None)
    model = schedule("full", folder)
    assert count == []
    assert not differing(weights(model), expected)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_last_stage_s_model_is_the_run_s_and_stays_when_it_was_calibrated(
    uninterrupted, schedule, tmp_path, weights, differing
):
    folder, expected = uninterrupted("one stage")
    shutil.copytree(folder, tmp_path / "run")
    model = tmp_path / "run" / "model"
    assert not differing(weights(SafeVlmForConditionalGeneration.from_pretrained(model)), expected)
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")  # another policy
    (model / "README.md").write_text("a person's words")
    schedule("one stage", tmp_path / "run")
    assert (model / "README.md").is_file() and (model / "config.json").read_text().endswith("\n\n")
    (model / "model.safetensors").write_bytes(b"of a training before")
    schedule("one stage", tmp_path / "run")
    assert not differing(weights(SafeVlmForConditionalGeneration.from_pretrained(model)), expected)


def test_after_stage_is_called_for_each_stage_trained_or_loaded(uninterrupted, processor, rows):
    folder, expected = uninterrupted("full")
    seen = []
    model = safe_model(tiny_llava(), processor)
    run_schedule(
        model,
        processor,
        rows,
        folder,
        RECIPES["full"],
        after_stage=lambda folder, model: seen.append((folder.name, model)),
    )
    assert [name for name, _ in seen] == ["1-safety_alignment", "2-joint_finetuning"]
    assert torch.equal(seen[1][1].state_dict()["base.lm_head.weight"], expected["base.lm_head.weight"])


def test_a_crash_while_saving_a_stage_leaves_no_model_and_is_made_good(
    uninterrupted, schedule, tmp_path, monkeypatch, weights, differing
):
    def full_disk(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    _, expected = uninterrupted("one stage")
    with monkeypatch.context() as patch:
        patch.setattr(SafeVlmProcessor, "save_pretrained", full_disk)  # the weights are written by then
        with pytest.raises(OSError, match="No space left"):
            schedule("one stage", tmp_path, save_strategy="no")
    assert not (tmp_path / "1-safety_alignment" / "model").exists()
    assert not differing(weights(schedule("one stage", tmp_path, save_strategy="no")), expected)
    assert not list(tmp_path.rglob(".model*"))  # nothing half-written is left


def test_a_crash_while_saving_leaves_the_former_model_whole(fresh_model, processor, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save_atomically(fresh_model(), processor, folder)
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def interrupted(self, *args, **kwargs):
        raise Killed

    monkeypatch.setattr(SafeVlmProcessor, "save_pretrained", interrupted)
    with pytest.raises(Killed):
        save_atomically(fresh_model(num_head_tokens=3), processor, folder)
    assert before == {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_saving_replaces_the_former_model_as_a_whole(fresh_model, processor, tmp_path):
    folder = tmp_path / "model"
    save_atomically(fresh_model(), processor, folder)
    (folder / "of_the_former").write_text("")
    save_atomically(fresh_model(num_head_tokens=3), processor, folder)
    assert SafeVlmForConditionalGeneration.from_pretrained(folder).config.num_head_tokens == 3
    assert not (folder / "of_the_former").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 0.5}, r"learning_rate was 0\.01, now 0\.5"),
        ({"seed": 3}, r"seed was None, now 3"),
        ({"lora_r": 2}, r"lora_r was None, now 2"),
    ],
)
def test_a_folder_with_a_run_of_other_settings_is_refused_and_kept(
    uninterrupted, schedule, tmp_path, changes, message
):
    folder, _ = uninterrupted("full")
    shutil.copytree(folder, tmp_path / "run")
    with pytest.raises(ValueError, match=rf"1-safety_alignment holds a training with other settings \({message}\)"):
        schedule("full", tmp_path / "run", **changes)
    assert (tmp_path / "run" / "2-joint_finetuning" / "model" / "model.safetensors").is_file()


def test_a_folder_with_a_run_on_other_rows_is_refused(uninterrupted, processor, rows):
    folder, _ = uninterrupted("full")
    with pytest.raises(ValueError, match="number of rows was 8, now 7"):
        run_schedule(safe_model(tiny_llava(), processor), processor, rows[:7], folder, RECIPES["full"])


def test_rows_may_be_given_by_stage(processor, rows, make_row, tmp_path, killed_at):
    by_stage = {"safety_alignment": rows[:2], "joint_finetuning": rows[:6]}
    count = killed_at(None)
    model = safe_model(tiny_llava(), processor)
    run_schedule(model, processor, by_stage, tmp_path, RECIPES["full"].with_arguments(save_strategy="no"))
    assert count.count("safety_alignment") == 2 and count.count("joint_finetuning") == 6


@pytest.mark.parametrize(
    "second, message",
    [
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is not supported"),
        ({"trainable": ["safety", "foo"]}, "`trainable` names 'foo', which matches no parameter"),
        ({"max_length": 5}, "`max_length` is 5"),
    ],
)
def test_what_is_wrong_with_a_later_stage_is_found_before_the_first_one_trains(
    processor, rows, killed_at, tmp_path, second, message
):
    recipe = Recipe([{"stage": "safety_alignment", **COMMON}, {"stage": "joint_finetuning", **COMMON, **second}])
    steps = killed_at(None)
    with pytest.raises(ValueError, match=message):
        run_schedule(safe_model(tiny_llava(), processor), processor, rows, tmp_path, recipe)
    assert not steps and not list(tmp_path.iterdir())


def test_a_folder_whose_name_holds_braces_is_named_as_it_is(tmp_path):
    check_same_run(tmp_path / "a{0}", {"seed": 1})
    with pytest.raises(ValueError, match=r"a\{0\} holds a training with other settings \(seed was 1, now 2\)"):
        check_same_run(tmp_path / "a{0}", {"seed": 2})
