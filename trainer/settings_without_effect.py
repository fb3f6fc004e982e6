"""Settings of a training that have no effect because another one overrides them: each is reported before it starts."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import fields

from .stage.argument_checks import check_reporting
from .stage.training_args import SafeVlmTrainingArguments

logger = logging.getLogger(__name__)

DEFAULTS = {field.name: field.default for field in fields(SafeVlmTrainingArguments)}
# Settings, when they have no effect (given a stage's settings, defaults included), and the reason.
RULES: tuple[tuple[tuple[str, ...], Callable[[Mapping], bool], str], ...] = (
    (("num_train_epochs",), lambda s: s["max_steps"] > 0, "`max_steps: {max_steps}` decides"),
    (("save_steps",), lambda s: _name(s["save_strategy"]) != "steps", "`save_strategy` is {save_strategy}"),
    (("save_total_limit", "save_only_model"), lambda s: _name(s["save_strategy"]) == "no", "`save_strategy` is no"),
    (("eval_steps",), lambda s: _name(s["eval_strategy"]) != "steps", "`eval_strategy` is {eval_strategy}"),
    (("eval_delay", "eval_on_start"), lambda s: _name(s["eval_strategy"]) == "no", "`eval_strategy` is no"),
    (
        ("logging_steps",),
        lambda s: _name(s["logging_strategy"]) != "steps",
        "`logging_strategy` is {logging_strategy}",
    ),
    (
        ("metric_for_best_model", "greater_is_better"),
        lambda s: not s["load_best_model_at_end"] and _name(s["save_strategy"]) != "best",
        "neither `load_best_model_at_end` nor `save_strategy: best` asks for the best model",
    ),
    (("warmup_steps",), lambda s: _name(s["lr_scheduler_type"]) == "constant", "`lr_scheduler_type` is constant"),
    (("lora_alpha", "lora_dropout"), lambda s: not s["lora_r"], "`lora_r` is 0"),
    (("fsdp_config",), lambda s: not s["fsdp"], "`fsdp` is not set"),
    (("hub_model_id", "hub_strategy", "hub_private_repo"), lambda s: not s["push_to_hub"], "`push_to_hub` is false"),
    (("run_name", "project"), lambda s: s["report_to"] in (None, "none", [], ["none"]), "`report_to` is none"),
)


def check_before_training(recipe, overrides: Mapping, seed: int, config=None):
    """
    Warns about each setting without effect.

    Args:
        recipe (`Recipe`)
        overrides (`dict`): Training arguments for all stages.
        seed (`int`): For all stages.
        config (`SafeVlmConfig`, *optional*): The base's, if it is a SafeVLM already.

    Raises:
        `ImportError` or `ValueError`: `report_to` names a reporter that is not installed, or unknown.
    """
    lines = [] if config is None else safety_without_effect(recipe.safety, config)
    for stage in recipe.stages:
        settings = {**stage, **overrides}
        check_reporting(settings.get("report_to"))
        lines += settings_without_effect(settings)
        for name in {"seed", "data_seed"} & set(stage) - set(overrides):
            if stage[name] != seed:
                lines.append(
                    f"`{name}: {stage[name]}` of the recipe has no effect: `--seed {seed}` is for all stages."
                )
    if os.environ.get("RANK", "0") == "0":  # in only one of several processes
        for line in dict.fromkeys(lines):
            logger.warning(line)


def settings_without_effect(stage: Mapping) -> list[str]:
    """A line for each of a stage's given settings that has no effect."""
    settings = {**DEFAULTS, **stage}
    shown = {name: _name(value) for name, value in settings.items()}
    return [
        f"`{name}: {shown[name]}` has no effect: {reason.format(**shown)}."
        for names, has_no_effect, reason in RULES
        for name in names
        if name in stage and has_no_effect(settings)
    ]


def safety_without_effect(safety: Mapping, config) -> list[str]:
    """A line for each entry of a recipe's `safety` that differs from `config`, that of a base that is a SafeVLM."""
    return [
        f"`safety: {name}: {value}` has no effect: the base is a SafeVLM already, and keeps its own, "
        f"{getattr(config, name)}."
        for name, value in safety.items()
        if json.dumps(getattr(config, name), default=str) != json.dumps(value, default=str)
    ]


def _name(value) -> str:
    """A strategy as people write it, such as `"no"`, whether it is an enumeration's member, text or false."""
    return "no" if value is False else str(getattr(value, "value", value))
