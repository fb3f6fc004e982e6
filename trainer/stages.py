"""The two-stage schedule as data: a recipe lists stages, a stage is a set of training arguments.

`run_schedule` runs a recipe from wherever it was interrupted. Each stage lives in its own folder of `output_dir`; its
`model/` appears, whole, when it is done.
"""

import filecmp
import logging
import os
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import yaml
from accelerate import PartialState

from safevlm import SafeVlmForConditionalGeneration
from safevlm.files import replace_folder
from safevlm.from_base import SAFETY_FIELDS

from .checkpoints import last_complete_checkpoint, save_atomically
from .encoded_rows import RowEncoder, encode_rows
from .preparation import trainable_weights
from .row_checks import check_sets
from .settings import check_settings, load_settings
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
            if "output_dir" in stage:
                raise ValueError(
                    f"Recipe {path}, stage {number}: leave out `output_dir`; a run names it for all stages."
                )
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
    compute_metrics=None,
    callbacks=None,
    **overrides,
) -> SafeVlmForConditionalGeneration:
    """
    Runs all stages of a recipe, a [`SafeVlmTrainer`] each, and returns the trained model.

    A stage whose `model/` is there is loaded, not trained again; one that was interrupted resumes from its last
    complete checkpoint. The same call, repeated, therefore always ends with the same weights; a call with other
    arguments than the ones the folder was made with raises `ValueError`.

    Args:
        model (`SafeVlmForConditionalGeneration`): With fresh safety modules, or one to train further.
        processor (`SafeVlmProcessor`)
        train_rows, eval_rows: Data sets as [`SafeVlmTrainer`] takes them, or a dict of them by stage name.
        output_dir: Gets `1-safety_alignment/`, `2-joint_finetuning/`, ... and, as `model/`, the last one's model.
        recipe (`Recipe`)
        after_stage (callable, *optional*): Called as `after_stage(stage_folder, model)` after each stage.
        compute_metrics, callbacks (*optional*): Of all the trainers.
        overrides: Training arguments for all stages, such as `seed` or `bf16`.
    """
    check_overrides(overrides)
    trains_before = False  # whether a stage is to train before the one that is looked at
    for number, arguments in enumerate(recipe.stages, start=1):
        arguments = {**arguments, **overrides, "output_dir": str(output_dir)}
        check_stage(model, processor, train_rows, eval_rows, arguments, trains_before)
        trains_before |= not (Path(output_dir) / f"{number}-{arguments['stage']}" / "model").is_dir()
    final = Path(output_dir) / "model"
    for number, arguments in enumerate(recipe.stages, start=1):
        arguments = {**arguments, **overrides}
        folder = Path(output_dir) / f"{number}-{arguments['stage']}"
        # First, since it says which of several processes this one is.
        args = SafeVlmTrainingArguments(**{**arguments, "output_dir": str(folder)})
        train, evaluation = (_of_stage(rows, args.stage) for rows in (train_rows, eval_rows))
        number_of_rows = {"number of rows": len(train)} if hasattr(train, "__len__") else {}
        check_same_run(folder, {**arguments, "safety": recipe.safety, **number_of_rows})
        done = folder / "model"
        if not done.is_dir():
            trainer = SafeVlmTrainer(
                model=model,
                args=args,
                train_dataset=train,
                eval_dataset=evaluation,
                processing_class=processor,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
            )
            trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
            save_atomically(model := trainer.model, processor, done)
        else:
            logger.info("stage %s is done, loading %s", folder.name, done)
            model = SafeVlmForConditionalGeneration.from_pretrained(done, dtype=model.dtype).to(model.device)
        if after_stage is not None:
            after_stage(folder, model)
    _leave_model(done, final)
    return model


def _leave_model(done: Path, final: Path):
    """Copies the last stage's model to `final`, unless it is there: by now it may be calibrated, or have a card."""
    state = PartialState()
    # One process decides: another would already see what this one writes.
    if state.is_main_process and not _same_weights(final, done):
        replace_folder(partial(shutil.copytree, done), final)
    state.wait_for_everyone()


def check_stage(model, processor, train_rows, eval_rows, arguments: dict, rows_too: bool):
    """Raises what the stage would raise before its first step: no other stage is to train before that in vain."""
    environment = dict(os.environ)
    try:
        args = SafeVlmTrainingArguments(**arguments)
    finally:
        os.environ.clear()  # where transformers puts what is of this stage alone
        os.environ.update(environment)
    if not args.uses_lora:
        trainable_weights(model, args.trainable)
    if rows_too:  # those of the first stage that trains are checked by its trainer
        train, evaluation = (_of_stage(rows, args.stage) for rows in (train_rows, eval_rows))
        encoder = RowEncoder(processor, model.config, args.hint_probability, args.max_length, args.seed)
        plain = RowEncoder(processor, model.config, max_length=args.max_length)
        check_sets(encode_rows(train, encoder), encode_rows(evaluation, plain), args)


def _same_weights(folder: Path, other: Path) -> bool:
    files = {path.name for path in other.glob("*.safetensors")}
    return files == {path.name for path in folder.glob("*.safetensors")} and all(
        filecmp.cmp(folder / name, other / name) for name in files
    )


def _of_stage(rows, stage: str):
    by_stage = isinstance(rows, dict) and set(rows) <= set(STAGES)
    return rows[stage] if by_stage else rows


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
