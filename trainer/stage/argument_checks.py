"""Training arguments of transformers that SafeVLM's training refuses, each with the reason and the fix."""

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

LABEL_NAMES = ["labels", "safety_level_labels", "safety_category_labels"]


def check_arguments(args):
    """Raises `ValueError` for an invalid training argument, or one that would silently change losses or batches."""
    for name in ("lora_r", "safety_level_loss_coef", "safety_category_loss_coef"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"`{name}` must be a number >= 0, got {value!r}.")
    refused = {
        "label_smoothing_factor": (
            args.label_smoothing_factor != 0,
            "it would replace the LM loss and drop the safety losses; leave it at 0",
        ),
        "use_liger_kernel": (args.use_liger_kernel, "there are no such kernels for SafeVLM; leave it out"),
        "torch_compile": (
            args.torch_compile,
            "safety tokens stand where a batch's content says, which compiled code cannot look up; leave it out",
        ),
        "remove_unused_columns": (
            args.remove_unused_columns,
            "it would drop inputs of the base, and encoded rows have no unused columns; leave it out",
        ),
        "label_names": (
            list(args.label_names or []) != LABEL_NAMES,
            f"evaluation needs {', '.join(LABEL_NAMES)}; leave it out",
        ),
        "debug": (
            "underflow_overflow" in str(args.debug),
            "it cannot inspect masks; a loss or gradient that is not finite stops training anyway, with its rows",
        ),
        "parallelism_config": (
            args.parallelism_config is not None,
            "splitting rows or weights over devices is untested; use DDP or FSDP",
        ),
        "accelerator_config.dispatch_batches": (
            bool(args.accelerator_config.dispatch_batches),
            "batches whose rows have several images cannot be split; set it to false",
        ),
    }
    for name, (is_set, reason) in refused.items():
        if is_set:
            raise ValueError(f"`{name}` is not supported in SafeVLM's training: {reason}.")
    if args.uses_lora and args.push_to_hub and args.hub_strategy.value in ("checkpoint", "all_checkpoints"):
        raise ValueError(
            f"`hub_strategy={args.hub_strategy.value}` is not supported with LoRA, whose checkpoints are adapters; "
            f"use 'end' and `trainer.push_to_hub()`, which pushes the merged model."
        )


def check_reporting(report_to: str | list[str] | None):
    """Raises `ImportError` for a `report_to` whose package is missing, `ValueError` for an unknown one."""
    names = {report_to} if isinstance(report_to, str) else set(report_to or ())
    for name in names - {"all", "none"}:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"`report_to` {name!r} is unknown; use none, all, or one of: {known}.")
        if name not in get_available_reporting_integrations():
            raise ImportError(f"`report_to` {name!r} needs a package that is not installed: pip install {name}.")
