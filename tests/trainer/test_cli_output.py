"""Long output: what progress bars write where nobody watches. And which settings are told to have no effect."""

import io
import logging
import sys
from functools import partial

import pytest
import tqdm
import tqdm.auto
import yaml
from datasets.utils import tqdm as datasets_tqdm
from huggingface_hub.utils import tqdm as hub_tqdm
from tiny import SIZES
from tqdm import std
from transformers.trainer_callback import ProgressCallback, TrainerControl, TrainerState
from transformers.utils import logging as transformers_logging

from safevlm import SafeVlmConfig
from safevlm.trainer import SafeVlmTrainingArguments
from safevlm.trainer.commands.progress_bars import plain_progress
from safevlm.trainer.recipe import Recipe
from safevlm.trainer.settings import load_settings
from safevlm.trainer.settings_without_effect import (
    RULES,
    check_before_training,
    safety_without_effect,
    settings_without_effect,
)
from safevlm.trainer.training_options import parse_overrides


@pytest.fixture
def plain(monkeypatch):
    """Bars of this process are plain, until the test's end."""
    for name in ("display", "clear"):
        monkeypatch.setattr(std.tqdm, name, getattr(std.tqdm, name))
    plain_progress()


BARS = {
    "tqdm": tqdm.tqdm,
    "tqdm.auto": tqdm.auto.tqdm,
    "transformers": transformers_logging.tqdm,
    "datasets": datasets_tqdm,
    "huggingface_hub": partial(hub_tqdm, disable=False),
}


@pytest.mark.parametrize("make", BARS.values(), ids=BARS)
@pytest.mark.parametrize("leave", [True, False])
def test_a_bar_writes_a_line_for_every_tenth_where_stderr_is_no_terminal(plain, make, leave, capsys):
    transformers_logging.enable_progress_bar()
    for _ in make(range(200), desc="work", leave=leave, mininterval=0, miniters=1):
        pass
    assert tenths(capsys.readouterr().err) == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]


def tenths(err: str) -> list[int]:
    lines = err.split("\n")
    assert "\r" not in err and lines.pop() == "" and all(lines)
    return [int(line.split("%")[0].split()[-1]) for line in lines]


def test_the_trainers_bar_and_what_it_logs_do_so_too(plain, capsys):
    callback, state, control = ProgressCallback(), TrainerState(max_steps=200), TrainerControl()
    callback.on_train_begin(None, state, control)
    callback.training_bar.mininterval = 0
    for step in range(1, 201):
        state.global_step = step
        callback.on_step_end(None, state, control)
        if step % 50 == 0:
            callback.on_log(None, state, control, logs={"loss": 1.0})
    callback.on_train_end(None, state, control)
    out, err = capsys.readouterr()
    assert len(tenths(err)) == 10 and out == "{'loss': '1'}\n" * 4


def test_a_bar_without_a_total_writes_its_end(plain, capsys):
    progress = tqdm.tqdm(mininterval=0)
    for _ in range(37):
        progress.update()
    assert capsys.readouterr().err == ""
    progress.close()
    err = capsys.readouterr().err
    assert err.startswith("37it ") and err.count("\n") == 1


def test_a_bar_that_stops_early_says_where(plain, capsys):
    progress = tqdm.tqdm(total=100, mininterval=0)
    progress.update(37)
    progress.update(2)
    progress.close()
    assert tenths(capsys.readouterr().err) == [37, 39]


def test_a_bar_in_a_terminal_stays_as_it_is(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    before = std.tqdm.display
    plain_progress()
    assert std.tqdm.display is before


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "1.e-4", ".1e-3", "+1e-4", "0.0001"])
def test_numbers_are_read_as_people_write_them(text):
    assert load_settings(text) == 0.0001 and load_settings(f"rate: {text}") == {"rate": 0.0001}


@pytest.mark.parametrize("text", ["e4", "1e", "1e4x", "'1e-4'", "v1e4", "1e-4-1"])
def test_what_is_no_number_stays_a_text(text):
    assert load_settings(text) == text.strip("'")


def test_a_recipe_may_write_1e_4(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("stages:\n- stage: safety_alignment\n  learning_rate: 1e-4\n  save_strategy: no\n")
    stage = Recipe.load(path).stages[0]
    assert stage["learning_rate"] == 1e-4
    assert SafeVlmTrainingArguments(output_dir=str(tmp_path), **stage).save_strategy == "no"


@pytest.mark.parametrize(
    "stage, line",
    [
        (
            {"max_steps": 5, "num_train_epochs": 3},
            "num_train_epochs: 3` has no effect: `max_steps: 5` decides.",
        ),
        ({"num_train_epochs": 3}, None),
        ({"save_strategy": "no", "save_steps": 9}, "save_steps: 9` has no effect: `save_strategy` is no."),
        ({"save_strategy": False, "save_steps": 9}, "save_steps: 9` has no effect: `save_strategy` is no."),
        ({"save_strategy": "epoch", "save_steps": 9}, "save_steps: 9` has no effect: `save_strategy` is epoch."),
        ({"save_strategy": "steps", "save_steps": 9}, None),
        ({"save_strategy": "no", "save_total_limit": 1}, "save_total_limit: 1` has no effect: `save_strategy` is no."),
        ({"eval_steps": 9}, "eval_steps: 9` has no effect: `eval_strategy` is no."),
        ({"eval_strategy": "steps", "eval_steps": 9}, None),
        ({"logging_strategy": "no", "logging_steps": 2}, "logging_steps: 2` has no effect: `logging_strategy` is no."),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 9},
            "warmup_steps: 9` has no effect: `lr_scheduler_type` is constant.",
        ),
        ({"lora_alpha": 9}, "lora_alpha: 9` has no effect: `lora_r` is 0."),
        ({"lora_alpha": 9, "lora_r": 4}, None),
        ({"push_to_hub": False, "hub_model_id": "a"}, "hub_model_id: a` has no effect: `push_to_hub` is false."),
    ],
    ids=str,
)
def test_a_setting_that_another_beats_is_told_by_name(stage, line):
    assert settings_without_effect({"stage": "safety_alignment", **stage}) == ([] if line is None else [f"`{line}"])


@pytest.mark.parametrize("name", ["paper", "demo"])
def test_the_shipped_recipes_have_no_setting_without_effect(name):
    assert [line for stage in Recipe.load(name).stages for line in settings_without_effect(stage)] == []


def test_every_rule_names_settings_that_there_are():
    names = {name for names, *_ in RULES for name in names}
    assert names <= set(SafeVlmTrainingArguments.__dataclass_fields__)


def test_the_sizes_of_a_base_that_is_a_safevlm_beat_the_recipes():
    config = SafeVlmConfig(**SIZES)
    assert safety_without_effect(SIZES, config) == []
    name, value = next(iter(SIZES.items()))
    (line,) = safety_without_effect({**SIZES, name: value + 1}, config)
    assert line == (
        f"`safety: {name}: {value + 1}` has no effect: the base is a SafeVLM already, and keeps its own, {value}."
    )


def test_what_has_no_effect_is_told_once(caplog, monkeypatch):
    stages = [{"stage": stage, "seed": 5} for stage in ("safety_alignment", "joint_finetuning")]
    with caplog.at_level(logging.WARNING):
        check_before_training(Recipe(stages), {"max_steps": 2, "num_train_epochs": 1}, seed=0)
    assert [record.message for record in caplog.records] == [
        "`num_train_epochs: 1` has no effect: `max_steps: 2` decides.",
        "`seed: 5` of the recipe has no effect: `--seed 0` is for all stages.",
    ]
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    check_before_training(Recipe(stages), {}, seed=0)
    assert not caplog.records


@pytest.mark.parametrize(
    "report_to, error, message",
    [
        ("wandb", ImportError, "`report_to` 'wandb' needs a package that is not installed: pip install wandb"),
        (["none", "tensorboard"], ImportError, "`report_to` 'tensorboard' needs a package"),
        ("wandboard", ValueError, "`report_to` 'wandboard' is unknown; use none, all, or one of: .*wandb"),
    ],
)
def test_a_reporter_that_is_not_there_is_named_before_training(report_to, error, message, monkeypatch):
    import safevlm.trainer.stage.argument_checks as module

    monkeypatch.setattr(module, "get_available_reporting_integrations", lambda: ["mlflow"])
    with pytest.raises(error, match=message):
        check_before_training(Recipe([{"stage": "safety_alignment", "report_to": report_to}]), {}, seed=0)
    check_before_training(Recipe([{"stage": "safety_alignment", "report_to": ["mlflow"]}]), {}, seed=0)


def test_overrides_read_numbers_as_recipes_do():
    assert parse_overrides(["learning_rate=1e-4"]) == {"learning_rate": 1e-4}
    assert parse_overrides(["save_strategy=no"]) == {"save_strategy": False} == {"save_strategy": yaml.safe_load("no")}
