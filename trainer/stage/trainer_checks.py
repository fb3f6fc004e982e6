"""What `SafeVlmTrainer` refuses apart from training arguments, each with the reason and the fix."""

from safevlm import SafeVlmConfig

from .training_args import SafeVlmTrainingArguments


def check_trainer_options(args, options: dict):
    """Raises `ValueError` for an argument of `Trainer` that cannot work here."""
    refused = {
        "compute_loss_func": "the loss is the LM loss plus the safety losses; set `safety_level_loss_coef` and "
        "`safety_category_loss_coef`, or override `compute_loss`",
        "model_init": "a stage prepares one model; make a trainer for each",
    }
    for name, reason in refused.items():
        if options.get(name) is not None:
            raise ValueError(f"`{name}` is not supported by SafeVlmTrainer: {reason}.")
    if args.uses_lora and (options.get("optimizers") or (None, None))[0] is not None:
        raise ValueError(
            "`optimizers` is not supported with LoRA, whose weights the trainer creates; pass "
            "`optimizer_cls_and_kwargs`."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would separate rows from their images. Start one process per GPU "
            f"(`torchrun --nproc_per_node {args.n_gpu}`), or set CUDA_VISIBLE_DEVICES to one."
        )


def check_parts(model, args, processing_class, train_dataset):
    """Raises `ValueError` for a model, arguments, a processor or rows that are not of the trainer's kind."""
    if not isinstance(args, SafeVlmTrainingArguments):
        raise ValueError(
            f"`args` must be SafeVlmTrainingArguments, which have the stage, got {type(args).__name__}. They take "
            f"everything that TrainingArguments take: `SafeVlmTrainingArguments(stage=..., output_dir=..., ...)`."
        )
    if isinstance(train_dataset, dict):
        raise ValueError(
            f"`train_dataset` is a dict of {', '.join(map(repr, train_dataset))}; pass one data set, such as "
            f"`rows[{next(iter(train_dataset), 'train')!r}]`."
        )
    if hasattr(model, "peft_config"):
        raise ValueError(
            "`model` already has PEFT adapters; pass the plain model, `lora_r` adds LoRA and merges it. If its "
            "training was interrupted, continue with that trainer (`train(resume_from_checkpoint=True)`) or reload it."
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
