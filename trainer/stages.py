"""The two-stage schedule as data: a recipe lists stages, a stage is a set of training arguments.

`run_schedule` runs a recipe from wherever it was interrupted. Each stage lives in its own folder of `output_dir`; its
`model/` appears, whole, when it is done.
"""

import json
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from accelerate import PartialState
from torch import nn
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from safevlm import SafeVlmForConditionalGeneration
from safevlm.from_base import SAFETY_FIELDS

from .card_callback import CardCallback
from .files import check_settings, load_settings, replace_folder
from .placement import check_sharding, check_weights, gather_weights, merge_lora, train_in_float32, without_weights
from .trainer import SafeVlmTrainer
from .training_args import STAGES, SafeVlmTrainingArguments

logger = logging.getLogger(__name__)
RECIPES = Path(__file__).parent / "recipes"
NUMBERS = (int, float, int | None, float | None)


@dataclass(frozen=True)
class Recipe:
    """
    Args:
        stages (`list[dict]`): Fields of [`SafeVlmTrainingArguments`] per stage, `stage` among them.
        safety (`dict`): Fields of [`SafeVlmConfig`] for a base that has no safety modules yet.
    """

    stages: list[dict]
    safety: dict = field(default_factory=dict)

    @classmethod
    def load(cls, name: str | os.PathLike) -> "Recipe":
        """A shipped recipe by name, or one from a YAML file."""
        path = Path(name) if str(name).endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
        if not path.is_file():
            shipped = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
            raise ValueError(f"Recipe {str(name)!r} not found; use a .yaml file or one of: {shipped}.")
        try:
            data = load_settings(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"Recipe {path} is no valid YAML: {error}") from None
        if not isinstance(data, dict) or not isinstance(data.get("stages"), list) or not data["stages"]:
            raise ValueError(f"Recipe {path}: `stages` must be a list with at least one stage.")
        if unknown := sorted(set(data) - {"stages", "safety"}):
            raise ValueError(f"Recipe {path}: unknown entries {', '.join(unknown)}; use `stages` and `safety`.")
        safety = data.get("safety") or {}
        if not isinstance(safety, dict):
            raise ValueError(f"Recipe {path}: `safety` must map fields of SafeVlmConfig to values, got {safety!r}.")
        if unknown := sorted(set(safety) - set(SAFETY_FIELDS)):
            raise ValueError(f"Recipe {path}, `safety`: unknown fields {', '.join(unknown)}.")
        for number, stage in enumerate(data["stages"], start=1):
            if not isinstance(stage, dict) or stage.get("stage") not in STAGES:
                raise ValueError(
                    f"Recipe {path}, stage {number}: `stage` must be one of {', '.join(STAGES)}, "
                    f"got {stage.get('stage') if isinstance(stage, dict) else stage!r}."
                )
            check_training_arguments(stage, f"Recipe {path}, stage {number}")
        return cls(stages=data["stages"], safety=safety)


def check_training_arguments(arguments: dict, where: str):
    """Raises `ValueError` for a name that is no training argument, and for a value that is plainly of a wrong type."""
    if unknown := sorted(set(arguments) - set(SafeVlmTrainingArguments.__dataclass_fields__)):
        raise ValueError(f"{where}: unknown training arguments {', '.join(unknown)}.")
    for name, value in arguments.items():
        kind = SafeVlmTrainingArguments.__dataclass_fields__[name].type
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind in NUMBERS and value is not None and not number:
            raise ValueError(f"{where}: `{name}` must be a number, got {value!r}.")
        if kind is bool and not isinstance(value, bool):
            raise ValueError(f"{where}: `{name}` must be true or false, got {value!r}.")


def check_overrides(overrides: dict):
    """As `check_training_arguments`, for arguments of all stages."""
    if fixed := sorted({"stage", "output_dir"} & set(overrides)):
        raise ValueError(f"`{fixed[0]}` cannot be the same for all stages; it comes from the recipe and the call.")
    check_training_arguments(overrides, "Arguments for all stages")


def run_schedule(
    model: SafeVlmForConditionalGeneration,
    processor,
    train_rows,
    output_dir: str | os.PathLike,
    recipe: Recipe,
    eval_rows=None,
    after_stage=None,
    **overrides,
) -> SafeVlmForConditionalGeneration:
    """
    Runs all stages of a recipe and returns the trained model.

    A stage whose `model/` is there is loaded, not trained again; one that was interrupted resumes from its last
    complete checkpoint. The same call, repeated, therefore always ends with the same weights; a call with other
    arguments than the ones the folder was made with raises `ValueError`.

    Args:
        model (`SafeVlmForConditionalGeneration`): With fresh safety modules, or one to train further.
        processor (`SafeVlmProcessor`)
        train_rows, eval_rows (sequence of `SafetyExample`, or a dict of them by stage name)
        output_dir: Gets `1-safety_alignment/`, `2-joint_finetuning/`, ...
        recipe (`Recipe`)
        after_stage (callable, *optional*): Called as `after_stage(stage_folder, model)` after each stage.
        overrides: Training arguments for all stages, such as `seed` or `bf16`.
    """
    check_overrides(overrides)
    for number, arguments in enumerate(recipe.stages, start=1):
        arguments = {**arguments, **overrides}
        folder = Path(output_dir) / f"{number}-{arguments['stage']}"
        train, evaluation = (
            part[arguments["stage"]] if isinstance(part, dict) else part for part in (train_rows, eval_rows)
        )
        # First, since it says which of several processes this one is.
        args = SafeVlmTrainingArguments(**{**arguments, "output_dir": str(folder)})
        check_same_run(folder, {**arguments, "safety": recipe.safety, "number of rows": len(train)})
        done = folder / "model"
        if done.is_dir():
            logger.info("stage %s is done, loading %s", folder.name, done)
            model = SafeVlmForConditionalGeneration.from_pretrained(done, dtype=model.dtype).to(model.device)
        else:
            model = train_stage(model, processor, args, train, evaluation)
            save_atomically(model, processor, done)
        if after_stage is not None:
            after_stage(folder, model)
    return model


def check_same_run(folder: Path, settings: dict):
    """A folder holds one training: going on with other settings would end with weights of neither."""
    state = PartialState()
    check_settings(
        folder / "settings.json",
        settings,
        f"{folder} holds a training with other settings ({{changes}}); repeat it as it was, or use another folder.",
        write=state.is_main_process,
    )
    state.wait_for_everyone()


def train_stage(model, processor, args: SafeVlmTrainingArguments, train_rows, eval_rows=None, callbacks=None):
    """Trains one stage, resuming if it was interrupted, and returns the plain model (LoRA merged)."""
    set_seed(args.seed)  # LoRA's initial weights must not depend on what ran before, or on whether anything did
    align_storage(model)
    check_weights(model, args)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    if args.uses_lora:
        model = add_lora(model, args)
    else:
        set_trainable(model, args.trainable)
    train_in_float32(model, args)
    trainer = SafeVlmTrainer(
        model=model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        callbacks=[CardCallback(), *(callbacks or [])],
    )
    check_sharding(trainer)
    empty = without_weights(trainer.model) if trainer.is_fsdp_enabled else None
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))
    model = trainer.accelerator.unwrap_model(trainer.model)
    if empty is not None:
        model = gather_weights(model, empty)
    if args.uses_lora:
        model = merge_lora(model, Path(args.output_dir) / "adapter")
    for name, parameter in model.named_parameters():
        if name in dtypes and parameter.dtype != dtypes[name] and dtypes[name].is_floating_point:
            parameter.data = parameter.data.to(dtypes[name])
        parameter.requires_grad = parameter.is_floating_point()  # a quantised base has integer weights
    return model.eval()


def align_storage(model):
    """
    Moves weights that lie at odd addresses (those of a mapped checkpoint file) to memory of their own.

    CPU kernels round differently there: a run resumed from a file would drift from one that was never interrupted.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def set_trainable(model: SafeVlmForConditionalGeneration, trainable: list[str]) -> int:
    """
    Freezes everything but the named parts; returns the number of trainable parameters.

    Args:
        trainable (`list[str]`): `"safety"`, `"language_model"`, or prefixes of parameter names such as
            `"base.model.multi_modal_projector"`.
    """
    language_model = tuple(f"base.{name}." for name in model.backbone.language_model_parts)
    prefixes = {part: language_model if part == "language_model" else (part.rstrip(".") + ".",) for part in trainable}
    matched = set()
    count = 0
    for name, parameter in model.named_parameters():
        parts = [part for part in trainable if name.startswith(prefixes[part])]
        if parts and not parameter.is_floating_point():
            raise ValueError(
                f"`trainable` names {parts[0]!r}, but its weight {name} is quantised ({parameter.dtype}) and cannot "
                f"be trained. Train it through LoRA (`lora_r`), train 'safety' alone, or load the base unquantised."
            )
        matched.update(parts)
        parameter.requires_grad = bool(parts)
        count += parameter.numel() * bool(parts)
    if missing := [part for part in trainable if part not in matched]:
        raise ValueError(
            f"`trainable` names {', '.join(map(repr, missing))}, which matches no parameter; "
            f"use 'safety', 'language_model' or a prefix of parameter names."
        )
    return count


def add_lora(model: SafeVlmForConditionalGeneration, args: SafeVlmTrainingArguments):
    """Wraps the model with LoRA on the language model's linear layers; the safety modules train in full beside it."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'safevlm[train]'.") from error
    prefix = f"base.{model.backbone.language_model_parts[0]}"
    leaves = sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if name.startswith(prefix + ".") and isinstance(module, nn.Linear)
        }
    )
    return get_peft_model(
        model,
        LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=rf"{re.escape(prefix)}\..*\.({'|'.join(leaves)})",
            modules_to_save=["safety"] if "safety" in args.trainable else None,
        ),
    )


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest checkpoint that was written to its end; an interrupted save is passed over."""
    found = [
        (int(match.group(1)), path)
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
        and _is_whole(path / TRAINER_STATE_NAME)  # the Trainer writes it last
    ]
    return str(max(found)[1]) if found else None


def _is_whole(trainer_state: Path) -> bool:
    try:
        json.loads(trainer_state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def save_atomically(model, processor, folder: Path):
    """Writes a model and its processor so that `folder` is there whole or not at all; an old one stays until then."""

    def save(partial):
        model.save_pretrained(partial)
        processor.save_pretrained(partial)

    write_atomically(save, folder)


def write_atomically(write, folder: Path):
    """
    Calls `write(partial_folder)`, then puts that folder in the place of `folder`; on the main process only.

    A crash leaves the former `folder` whole, or, between two renames, none.
    """
    state = PartialState()
    if state.is_main_process:
        replace_folder(write, Path(folder))
    state.wait_for_everyone()
