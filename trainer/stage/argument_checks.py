"""Which of transformers' Trainer features SafeVLM's training refuses, each by name and with what to do instead."""

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

LABEL_NAMES = ["labels", "safety_level_labels", "safety_category_labels"]


def check_arguments(args):
    """Raises `ValueError` for a training argument that would change the loss or the batches behind our back."""
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
            "where safety tokens stand depends on a batch's content, which compiled code cannot ask; leave it out",
        ),
        "remove_unused_columns": (
            args.remove_unused_columns,
            "it would drop inputs of the base; our rows have no other columns",
        ),
        "label_names": (
            list(args.label_names or []) != LABEL_NAMES,
            f"evaluation needs {', '.join(LABEL_NAMES)}; leave it out",
        ),
        "debug": (
            "underflow_overflow" in str(args.debug),
            "it cannot look at masks; a loss or gradient that is not finite stops the training with its rows anyway",
        ),
        "parallelism_config": (
            args.parallelism_config is not None,
            "splitting rows or weights over devices is untried; use DDP or FSDP",
        ),
        "accelerator_config.dispatch_batches": (
            bool(args.accelerator_config.dispatch_batches),
            "batches with several images to a row cannot be cut up; set it to false",
        ),
    }
    for name, (asked, why) in refused.items():
        if asked:
            raise ValueError(f"`{name}` is not supported in SafeVLM's training: {why}.")
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
