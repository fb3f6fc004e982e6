"""Runs a recipe's stages one after the other, from wherever they were interrupted.

Each stage has its own folder in `output_dir`; `model/` appears in it, complete, when the stage is done.
"""

import filecmp
import logging
import os
import shutil
from functools import partial
from pathlib import Path

from accelerate import PartialState

from safevlm import SafeVlmForConditionalGeneration
from safevlm.files import replace_folder

from .encoding.encoded_datasets import encode_rows
from .encoding.row_checks import check_sets
from .encoding.row_encoder import RowEncoder
from .recipe import Recipe
from .settings import check_settings
from .stage.checkpoints import last_complete_checkpoint, save_atomically
from .stage.stage_model import trainable_weights
from .stage.trainer import SafeVlmTrainer
from .stage.training_args import STAGES, SafeVlmTrainingArguments

logger = logging.getLogger(__name__)


def run_schedule(
    model: SafeVlmForConditionalGeneration,
    processor,
    train_rows,
    output_dir: str | os.PathLike,
    recipe: Recipe,
    eval_rows=None,
    after_stage=None,
    **trainer_options,
) -> SafeVlmForConditionalGeneration:
    """
    Runs all stages of a recipe, each with its own [`SafeVlmTrainer`], and returns the trained model.

    A stage whose `model/` exists is loaded instead of trained; an interrupted one resumes from its last complete
    checkpoint. So the same call, repeated, always ends with the same weights. A call with settings other than those
    that the folder was created with raises `ValueError`.

    Args:
        model (`SafeVlmForConditionalGeneration`): With fresh safety modules, or one to train further.
        processor (`SafeVlmProcessor`)
        train_rows, eval_rows: Data sets as [`SafeVlmTrainer`] takes them, or a dict of them by stage name.
        output_dir: Gets the folders of `recipe.folders(output_dir)` and `model/`, the last stage's model.
        recipe (`Recipe`): For arguments that all stages share, see [`Recipe.with_arguments`].
        after_stage (callable, *optional*): Called as `after_stage(folder, model)` after each stage, with its
            [`StageFolder`].
        trainer_options: Further arguments of every [`SafeVlmTrainer`], such as `callbacks` or `compute_metrics`.
    """
    folders = recipe.folders(output_dir)
    _check_all_stages(model, processor, train_rows, eval_rows, recipe, folders)
    for folder, arguments in zip(folders, recipe.stages, strict=True):
        # Made first: the arguments set up the process group, and `check_same_run` asks for this process's rank.
        args = SafeVlmTrainingArguments(**{**arguments, "output_dir": str(folder.path)})
        train, evaluation = (_of_stage(rows, args.stage) for rows in (train_rows, eval_rows))
        number_of_rows = {"number of rows": len(train)} if hasattr(train, "__len__") else {}
        check_same_run(folder.path, {**arguments, "safety": recipe.safety, **number_of_rows})
        if folder.model.is_dir():
            logger.info("stage %s is done, loading %s", folder.name, folder.model)
            model = SafeVlmForConditionalGeneration.from_pretrained(folder.model, dtype=model.dtype).to(model.device)
        else:
            trainer = SafeVlmTrainer(
                model=model,
                args=args,
                train_dataset=train,
                eval_dataset=evaluation,
                processing_class=processor,
                **trainer_options,
            )
            trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder.path))
            save_atomically(model := trainer.model, processor, folder.model)
        if after_stage is not None:
            after_stage(folder, model)
    _copy_model(folders[-1].model, Path(output_dir) / "model")
    return model


def _check_all_stages(model, processor, train_rows, eval_rows, recipe: Recipe, folders):
    """Checks every stage before the first one trains, so that no stage trains in vain."""
    trains_before = False
    for folder, arguments in zip(folders, recipe.stages, strict=True):
        arguments = {**arguments, "output_dir": str(folder.path.parent)}  # a check makes no stage folder
        # The rows of the first stage that trains are checked by its trainer.
        check_stage(model, processor, train_rows, eval_rows, arguments, trains_before)
        trains_before |= not folder.model.is_dir()


def check_stage(model, processor, train_rows, eval_rows, arguments: dict, check_rows: bool):
    """Raises whatever the stage would raise before its first step."""
    environment = dict(os.environ)
    try:
        args = SafeVlmTrainingArguments(**arguments)
    finally:
        os.environ.clear()  # transformers keeps settings of a single stage there
        os.environ.update(environment)
    if not args.uses_lora:
        trainable_weights(model, args.trainable)
    if check_rows:
        train, evaluation = (_of_stage(rows, args.stage) for rows in (train_rows, eval_rows))
        encoder = RowEncoder(processor, model.config, args.hint_probability, args.max_length, args.seed)
        encoder_without_hints = RowEncoder(processor, model.config, max_length=args.max_length)
        check_sets(encode_rows(train, encoder), encode_rows(evaluation, encoder_without_hints), args)


def check_same_run(folder: Path, settings: dict):
    """Raises `ValueError` if `folder` holds a training with other settings: the result would be a mixture of both."""
    state = PartialState()
    check_settings(
        folder / "settings.json",
        settings,
        f"{folder} holds a training with other settings ({{changes}}); repeat it as it was, or use another folder.",
        write=state.is_main_process,
    )
    state.wait_for_everyone()


def _of_stage(rows, stage: str):
    by_stage = isinstance(rows, dict) and set(rows) <= set(STAGES)
    return rows[stage] if by_stage else rows


def _copy_model(trained: Path, final: Path):
    """Copies the last stage's model to `final`, unless `final` has these weights: it may have a newer policy."""
    state = PartialState()
    # One process decides: another would already see what this one writes.
    if state.is_main_process and not _same_weights(final, trained):
        replace_folder(partial(shutil.copytree, trained), final)
    state.wait_for_everyone()


def _same_weights(folder: Path, other: Path) -> bool:
    files = {path.name for path in other.glob("*.safetensors")}
    return files == {path.name for path in folder.glob("*.safetensors")} and all(
        filecmp.cmp(folder / name, other / name) for name in files
    )
