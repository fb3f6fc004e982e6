"""Runs a recipe's stages from wherever they were interrupted.

Each stage lives in its own folder of `output_dir`; its `model/` appears, whole, when it is done.
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
from .recipe import Recipe, check_overrides
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
