"""The two-stage schedule as data: a recipe lists stages, a stage is a set of training arguments.

`run_schedule` runs a recipe from wherever it was interrupted. Each stage lives in its own folder of `output_dir`; its
`model/` appears, whole, when it is done.
"""

import logging
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from safevlm import SafeVlmForConditionalGeneration

from .trainer import SafeVlmTrainer
from .training_args import STAGES, SafeVlmTrainingArguments

logger = logging.getLogger(__name__)
RECIPES = Path(__file__).parent / "recipes"


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
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not isinstance(data.get("stages"), list) or not data["stages"]:
            raise ValueError(f"Recipe {path}: `stages` must be a list with at least one stage.")
        if unknown := sorted(set(data) - {"stages", "safety"}):
            raise ValueError(f"Recipe {path}: unknown entries {', '.join(unknown)}; use `stages` and `safety`.")
        common = {name for name in SafeVlmTrainingArguments.__dataclass_fields__}
        for number, stage in enumerate(data["stages"], start=1):
            if unknown := sorted(set(stage) - common):
                raise ValueError(f"Recipe {path}, stage {number}: unknown training arguments {', '.join(unknown)}.")
            if stage.get("stage") not in STAGES:
                raise ValueError(
                    f"Recipe {path}, stage {number}: `stage` must be one of {', '.join(STAGES)}, got {stage.get('stage')!r}."
                )
        return cls(stages=data["stages"], safety=data.get("safety") or {})


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

    A stage whose `model/` is there is loaded, not trained again; one that was interrupted resumes from its last complete
    checkpoint. The same call, repeated, therefore always ends with the same weights.

    Args:
        model (`SafeVlmForConditionalGeneration`): With fresh safety modules, or one to train further.
        processor (`SafeVlmProcessor`)
        train_rows, eval_rows (sequence of `SafetyExample`, or a dict of them by stage name)
        output_dir: Gets `1-safety_alignment/`, `2-joint_finetuning/`, ...
        recipe (`Recipe`)
        after_stage (callable, *optional*): Called as `after_stage(stage_folder, model)` after each stage.
        overrides: Training arguments for all stages, such as `seed` or `bf16`.
    """
    for number, arguments in enumerate(recipe.stages, start=1):
        arguments = {**arguments, **overrides}
        folder = Path(output_dir) / f"{number}-{arguments['stage']}"
        done = folder / "model"
        if done.is_dir():
            logger.info("stage %s is done, loading %s", folder.name, done)
            model = SafeVlmForConditionalGeneration.from_pretrained(done, dtype=model.dtype).to(model.device)
        else:
            args = SafeVlmTrainingArguments(output_dir=str(folder), **arguments)
            rows = [part[args.stage] if isinstance(part, dict) else part for part in (train_rows, eval_rows)]
            model = train_stage(model, processor, args, *rows)
            save_atomically(model, processor, done)
        if after_stage is not None:
            after_stage(folder, model)
    return model


def train_stage(model, processor, args: SafeVlmTrainingArguments, train_rows, eval_rows=None, callbacks=None):
    """Trains one stage, resuming if it was interrupted, and returns the plain model (LoRA merged)."""
    if args.lora_r:
        model = add_lora(model, args)
    else:
        set_trainable(model, args.trainable)
    trainer = SafeVlmTrainer(
        model=model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))
    model = trainer.accelerator.unwrap_model(trainer.model)
    if args.lora_r:
        model.save_pretrained(Path(args.output_dir) / "adapter")
        model = model.merge_and_unload()
    return model.requires_grad_(True).eval()


def set_trainable(model: SafeVlmForConditionalGeneration, trainable: list[str]) -> int:
    """
    Freezes everything but the named parts; returns the number of trainable parameters.

    Args:
        trainable (`list[str]`): `"safety"`, `"language_model"`, or prefixes of parameter names such as
            `"base.model.multi_modal_projector"`.
    """
    prefixes = []
    for part in trainable:
        if part == "language_model":
            prefixes += [f"base.{name}." for name in model.backbone.language_model_parts]
        else:
            prefixes.append(part if part.endswith(".") else part + ".")
    matched = set()
    count = 0
    for name, parameter in model.named_parameters():
        hits = [prefix for prefix in prefixes if name.startswith(prefix)]
        matched.update(hits)
        parameter.requires_grad = bool(hits)
        count += parameter.numel() * bool(hits)
    if trainable and not matched:
        raise ValueError(f"`trainable` {trainable} matches no parameter; use 'safety', 'language_model' or a prefix.")
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
        and (path / "trainer_state.json").is_file()  # the Trainer writes it last
    ]
    return str(max(found)[1]) if found else None


def save_atomically(model, processor, folder: Path):
    """Writes a model and its processor so that `folder` is there whole or not at all; an old one stays until then."""
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
