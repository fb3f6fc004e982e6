"""Which of transformers' Trainer features SafeVLM's training refuses, each by name and with what to do instead."""

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from safevlm import SafeVlmConfig

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


def check_trainer_options(args, options: dict):
    """Raises `ValueError` for an argument of `Trainer` beside `args` that cannot work here."""
    why = {
        "compute_loss_func": "the loss is the LM loss plus the safety losses; set `safety_level_loss_coef` and "
        "`safety_category_loss_coef`, or override `compute_loss`",
        "model_init": "a stage prepares one model; make a trainer for each",
    }
    for name, reason in why.items():
        if options.get(name) is not None:
            raise ValueError(f"`{name}` is not supported by SafeVlmTrainer: {reason}.")
    if args.uses_lora and (options.get("optimizers") or (None, None))[0] is not None:
        raise ValueError(
            "`optimizers` is not supported with LoRA, whose weights the trainer makes; pass "
            "`optimizer_cls_and_kwargs`."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would cut batches apart from their images. Start one process per GPU "
            f"(`torchrun --nproc_per_node {args.n_gpu}`), or set CUDA_VISIBLE_DEVICES to one."
        )


def check_parts(model, args, processing_class, train_dataset):
    """Raises `ValueError` for a model, arguments, a processor or rows of another kind than the trainer's."""
    from .training_args import SafeVlmTrainingArguments  # which imports this file

    if not isinstance(args, SafeVlmTrainingArguments):
        raise ValueError(
            f"`args` must be SafeVlmTrainingArguments, which has the stage, got {type(args).__name__}. It takes "
            f"whatever TrainingArguments takes: `SafeVlmTrainingArguments(stage=..., output_dir=..., ...)`."
        )
    if isinstance(train_dataset, dict):
        raise ValueError(
            f"`train_dataset` is a dict of {', '.join(map(repr, train_dataset))}; pass one data set, such as "
            f"`rows[{next(iter(train_dataset), 'train')!r}]`."
        )
    if hasattr(model, "peft_config"):
        raise ValueError(
            "`model` has PEFT adapters already; pass the plain model, `lora_r` adds LoRA and merges it. If its "
            "training was interrupted, go on with that trainer (`train(resume_from_checkpoint=True)`) or load it anew."
        )
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) != SafeVlmConfig.model_type:
        raise ValueError(
            f"`model` must be a SafeVlmForConditionalGeneration (make one with `from_base`), got "
            f"{model if isinstance(model, str) else type(model).__name__!r}."
        )
    if processing_class is None or getattr(processing_class, "tokens_per_image", None) != config.tokens_per_image:
        raise ValueError(
            f"`processing_class` must be the model's SafeVlmProcessor with "
            f"`tokens_per_image={config.tokens_per_image}`, "
            f"got {getattr(processing_class, 'tokens_per_image', processing_class)!r}."
        )
