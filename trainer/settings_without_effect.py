"""Settings of a training that cannot work as given, found before it starts: those that another beats are told, once,
by name; a reporter that is not installed is an error.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import fields

from .stage.argument_checks import check_reporting
from .stage.training_args import SafeVlmTrainingArguments

logger = logging.getLogger(__name__)

_DEFAULTS = {field.name: field.default for field in fields(SafeVlmTrainingArguments)}
# Settings, when they have no effect (asked of a stage's settings, defaults included), and what beats them.
_RULES: tuple[tuple[tuple[str, ...], Callable[[Mapping], bool], str], ...] = (
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
    Args:
        recipe (`Recipe`), overrides (`dict`), seed (`int`): What is asked for; the latter two are for all stages.
        config (`SafeVlmConfig`, *optional*): Of a base that is a SafeVLM already.

    Raises:
        `ImportError` or `ValueError`: `report_to` names what is not installed, or unknown.
    """
    lines = [] if config is None else overruled_safety(recipe.safety, config)
    for stage in recipe.stages:
        settings = {**stage, **overrides}
        names = settings.get("report_to") or []
        check_reporting(
            [name for name in ([names] if isinstance(names, str) else names) if name not in ("all", "none")]
        )
        lines += overruled(settings)
        for name in {"seed", "data_seed"} & set(stage) - set(overrides):
            if stage[name] != seed:
                lines.append(
                    f"`{name}: {stage[name]}` of the recipe has no effect: `--seed {seed}` is for all stages."
                )
    if os.environ.get("RANK", "0") == "0":  # one of several processes
        for line in dict.fromkeys(lines):
            logger.warning(line)


def overruled(stage: Mapping) -> list[str]:
    """What of a stage's given settings has no effect, a line each."""
    settings = {**_DEFAULTS, **stage}
    shown = {name: _name(value) for name, value in settings.items()}
    return [
        f"`{name}: {shown[name]}` has no effect: {why.format(**shown)}."
        for names, beaten, why in _RULES
        for name in names
        if name in stage and beaten(settings)
    ]


def overruled_safety(safety: Mapping, config) -> list[str]:
    """What a recipe's `safety` asks for and a base that is a SafeVLM has otherwise, in its `config`."""
    found = {name: getattr(config, name) for name in safety}
    return [
        f"`safety: {name}: {safety[name]}` has no effect: the base is a SafeVLM already, and keeps its own, {value}."
        for name, value in found.items()
        if json.dumps(value, default=str) != json.dumps(safety[name], default=str)
    ]


def _name(value) -> str:
    """A strategy as people write it: `"no"`, be it an enumeration's member, a text, or what YAML makes of `no`."""
    return "no" if value is False else str(getattr(value, "value", value))
