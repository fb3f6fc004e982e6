"""The shipped DeepSpeed configuration: found by name, parsed as the Trainer does, filled in from the arguments."""

import importlib.util
import json

import pytest
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from safevlm.trainer import training_args
from safevlm.trainer.stage.training_args import DEEPSPEED_CONFIGS

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (pip install deepspeed)"
)


@pytest.mark.parametrize("path", sorted(DEEPSPEED_CONFIGS.glob("deepspeed_*.json")), ids=lambda path: path.name)
def test_each_shipped_configuration_is_one_of_zero2_and_leaves_the_recipe_its_numbers(path):
    config = HfDeepSpeedConfig(str(path))
    assert config.is_zero2() and not config.is_offload()
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert config.get_value(name) == "auto"
    assert config.get_value("bf16.enabled") == "auto" and config.get_value("gradient_clipping") == "auto"
    assert config.get_value("optimizer") is None and config.get_value("scheduler") is None


def test_zero2_is_shipped_by_that_name(monkeypatch):
    monkeypatch.setattr(training_args.importlib.util, "find_spec", lambda name: object())
    found = training_args._deepspeed_file("zero2")
    assert json.loads(open(found, encoding="utf-8").read())["zero_optimization"]["stage"] == 2


def test_the_users_own_file_is_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(training_args.importlib.util, "find_spec", lambda name: object())
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert training_args._deepspeed_file(str(tmp_path / "mine.json")) == str(tmp_path / "mine.json")


def test_a_name_that_is_neither_is_refused(arguments, tmp_path):
    with pytest.raises(ValueError, match=r"'zero9' is neither a file nor a shipped configuration \(zero2\)"):
        arguments(deepspeed="zero9")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="bad.json' is not valid JSON"):
        arguments(deepspeed=str(tmp_path / "bad.json"))


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_without_deepspeed_the_error_says_what_to_install(arguments):
    with pytest.raises(ImportError, match="pip install deepspeed"):
        arguments(deepspeed="zero2")


@needs_deepspeed
def test_the_trainer_fills_the_shipped_configuration_in(arguments):
    args = arguments(deepspeed="zero2", bf16=True, per_device_train_batch_size=2, gradient_accumulation_steps=8)
    args.hf_deepspeed_config.trainer_config_finalize(args, None, 10)
    config = args.hf_deepspeed_config.config
    assert config["bf16"]["enabled"] is True and config["fp16"]["enabled"] is False
    assert config["train_micro_batch_size_per_gpu"] == 2 and config["gradient_accumulation_steps"] == 8
    assert "auto" not in json.dumps(config)
