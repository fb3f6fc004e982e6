"""Prepares a model for a stage, and makes it a plain model again afterwards."""

from pathlib import Path

from transformers import set_seed

from safevlm import SafeVlmForConditionalGeneration

from .lora import add_lora, language_model_parts, merge_lora
from .precision import align_storage, check_weights, train_in_float32
from .sharding import gather_weights
from .training_args import SafeVlmTrainingArguments


class StageModel:
    """
    A model during a stage: frozen except for the parts that train, those in float32, and with LoRA.

    Args:
        model (`SafeVlmForConditionalGeneration`): Changed in place.
        args (`SafeVlmTrainingArguments`)

    Attributes:
        model: The model to train: the given one or, with LoRA, PEFT's wrapper around it.
    """

    def __init__(self, model: SafeVlmForConditionalGeneration, args: SafeVlmTrainingArguments):
        set_seed(args.seed)  # LoRA's initial weights must not depend on what ran before
        self.args = args
        self.before = {name: (weight.dtype, weight.requires_grad) for name, weight in model.named_parameters()}
        align_storage(model)
        check_weights(model, args)
        if args.uses_lora:
            model = add_lora(model, args)
        else:
            set_trainable(model, args.trainable)
        train_in_float32(model, args)
        self.model = model

    def end(self, model, empty=None):
        """
        Returns the plain model with the trained weights: LoRA merged (its adapter is saved to `output_dir/adapter`),
        dtypes and `requires_grad` as before the stage.

        Args:
            model: `self.model`, or its FSDP form together with `empty` (see `gather_weights`).
        """
        if empty is not None:
            model = gather_weights(model, empty)
        if self.args.uses_lora:
            model = merge_lora(model, Path(self.args.output_dir) / "adapter")
        return self._restored(model).eval()

    def undo(self):
        """Restores the model to what it was before the stage."""
        self._restored(self.model.unload() if self.args.uses_lora else self.model)

    def _restored(self, model):
        for name, parameter in model.named_parameters():
            dtype, trainable = self.before.get(name, (parameter.dtype, True))
            if parameter.dtype != dtype and dtype.is_floating_point:
                parameter.data = parameter.data.to(dtype)
            # A quantised base's integer weights, dequantised for the merge, are floating point now and can be trained.
            parameter.requires_grad = parameter.is_floating_point() and (trainable or not dtype.is_floating_point)
        return model


def set_trainable(model: SafeVlmForConditionalGeneration, trainable: list[str]) -> int:
    """
    Freezes everything except the named parts; returns the number of trainable parameters.

    Args:
        trainable (`list[str]`): `"safety"`, `"language_model"`, or prefixes of parameter names such as
            `"base.model.multi_modal_projector"`.
    """
    weights = trainable_weights(model, trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in weights
    return sum(weights.values())


def trainable_weights(model: SafeVlmForConditionalGeneration, trainable: list[str]) -> dict[str, int]:
    """
    Names and sizes of the weights that `trainable` selects.

    Raises:
        `ValueError`: An entry of `trainable` matches no weight, or one that cannot be trained.
    """
    language_model = tuple(f"{name}." for name in language_model_parts(model))
    prefixes = {part: language_model if part == "language_model" else (part.rstrip(".") + ".",) for part in trainable}
    matched, weights = set(), {}
    for name, parameter in model.named_parameters():
        parts = [part for part in trainable if name.startswith(prefixes[part])]
        if parts and not parameter.is_floating_point():
            raise ValueError(
                f"`trainable` names {parts[0]!r}, but its weight {name} is quantised ({parameter.dtype}) and cannot "
                f"be trained. Train it through LoRA (`lora_r`), train 'safety' alone, or load the base unquantised."
            )
        matched.update(parts)
        if parts:
            weights[name] = parameter.numel()
    if missing := [part for part in trainable if part not in matched]:
        raise ValueError(
            f"`trainable` names {', '.join(map(repr, missing))}, which matches no parameter; "
            f"use 'safety', 'language_model' or a prefix of parameter names."
        )
    return weights
