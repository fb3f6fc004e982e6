"""`safevlm train`: rows and pictures in, a trained and evaluated model out."""

import json
import logging
import os
import shutil
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoConfig, set_seed

from safevlm import SafeVlmConfig, SafeVlmForConditionalGeneration, SafeVlmProcessor
from safevlm.backbones import get_backbone
from safevlm.model_card import write_card
from safevlm.model_card.card import CARD

from .card_facts import (
    base_facts,
    data_facts,
    head_results,
    model_facts,
    row_counts,
    stage_facts,
    train_command,
)
from .data import SafetyLabels, load_labels, read_rows, split_holdout
from .evaluation import trainer_metrics
from .stages import Recipe, check_overrides, run_schedule, write_atomically
from .trainer import SafeVlmTrainer
from .training_args import SafeVlmTrainingArguments

logger = logging.getLogger(__name__)


def train_from_files(
    base: str | os.PathLike,
    data: list[str | os.PathLike],
    output_dir: str | os.PathLike,
    images: str | os.PathLike | None = None,
    recipe: str | os.PathLike = "paper",
    holdout: float = 0.1,
    assume_safe: bool = False,
    on_error: str = "raise",
    dtype: str = "auto",
    seed: int = 0,
    overrides: dict | None = None,
    **reading: str | os.PathLike | None,
) -> dict:
    """
    Trains both stages and returns a report, which is also written to `output_dir/report.json`.

    Args:
        base: Hub id or folder of a supported vision-language model, or of a SafeVLM to train further.
        data: Files, folders, zips or Hub ids, as [`read_rows`] takes them.
        images: Folder (or zip) of the rows' images; by default each file's own.
        output_dir: Gets `model/`, `report.json` and a folder per stage. The same call resumes an interrupted run.
        holdout (`float` in [0, 1)): Share of rows, by image, kept out of training and evaluated on; 0 for none.
        assume_safe, on_error: See [`read_rows`].
        dtype: Of the weights; `"auto"` is the one they are stored in (but bfloat16 for a float16 base and a recipe
            with `bf16`, as the two cannot be mixed). What trains does so in float32 under mixed precision.
        overrides: Training arguments for all stages.
        reading: `format`, `taxonomy`, `split`, `subset`, `revision` of [`read_rows`], for all of `data`.
    """
    output_dir = Path(output_dir)
    recipe_asked, dtype_asked, overrides_asked = recipe, dtype, overrides
    recipe = Recipe.load(recipe)
    if not 0 <= holdout < 1:
        raise ValueError(f"`holdout` must be in [0, 1), got {holdout}.")
    check_overrides(overrides or {})
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"`dtype` must be 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}.")
    config = AutoConfig.from_pretrained(base)
    if not isinstance(config, SafeVlmConfig):
        get_backbone(config)  # a clear error before anything is read
    further = isinstance(config, SafeVlmConfig)
    labels = SafetyLabels.from_config(config) if further else load_labels({"safety": recipe.safety})
    parts = [
        read_rows(
            path,
            images,
            labels=labels,
            assume_safe=assume_safe,
            on_error=on_error,
            **reading,
        )
        for path in data
    ]
    rows = [row for part in parts for row in part]
    skipped = [problem for part in parts for problem in part.skipped]
    if not rows:
        raise ValueError(f"No row to train on in {', '.join(map(str, data))} ({len(skipped)} skipped).")
    train_rows, eval_rows = split_holdout(rows, holdout, seed=seed) if holdout else (rows, None)

    stages = [{**stage, **(overrides or {})} for stage in recipe.stages]
    if dtype == "auto" and config.dtype == torch.float16 and any(stage.get("bf16") for stage in stages):
        dtype = "bfloat16"
    set_seed(seed)
    if isinstance(config, SafeVlmConfig):
        processor = SafeVlmProcessor.from_pretrained(base)
        model = SafeVlmForConditionalGeneration.from_pretrained(base, dtype=dtype)
    else:
        processor = SafeVlmProcessor.from_base(base, config=SafeVlmConfig(**recipe.safety))
        model = SafeVlmForConditionalGeneration.from_base(
            base, processor, base_kwargs={"dtype": dtype}, **recipe.safety
        )
    overrides = {"seed": seed, "data_seed": seed, "use_cpu": not torch.cuda.is_available(), **(overrides or {})}
    metrics = {}

    def after_stage(folder: Path, model):
        if eval_rows is not None:
            metrics[folder.name.split("-", 1)[1]] = evaluate_head(model, processor, eval_rows, folder, overrides)

    model = run_schedule(model, processor, train_rows, output_dir, recipe, after_stage=after_stage, **overrides)
    report = {
        "num_train_rows": len(train_rows),
        "num_eval_rows": len(eval_rows or []),
        "skipped": [{"row": row, "reason": reason} for row, reason in skipped],
        "metrics": metrics,
        "model": str(output_dir / "model"),
    }
    last = output_dir / f"{len(recipe.stages)}-{recipe.stages[-1]['stage']}" / "model"

    def facts() -> dict:
        options = {"holdout": holdout, "assume_safe": assume_safe, "dtype": dtype_asked, "seed": seed, **reading}
        if on_error == "skip":
            options["skip_bad_rows"] = True
        training = {
            "command": train_command(base, data, images, recipe_asked, output_dir, options, overrides_asked),
            "rows": len(train_rows),
            "held_out": len(eval_rows or []),
            "skipped": len(skipped),
            **row_counts(train_rows, labels.category_names, labels.level_names),
            **data_facts(data, reading.get("revision")),
            "stages": stage_facts(output_dir, recipe, overrides),
        }
        return model_facts("SafeVLM", base_facts(base, config), training, head_results(report, training, model.config))

    def publish(partial: Path):
        shutil.copytree(last, partial)
        if (output_dir / "model" / CARD).is_file():  # a person's words in it stay
            shutil.copy(output_dir / "model" / CARD, partial / CARD)
        write_card(partial, facts(), model_id="model")

    write_atomically(publish, output_dir / "model")
    if PartialState().is_main_process:
        (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def evaluate_head(model, processor, rows, folder: Path, overrides: dict) -> dict[str, float]:
    """Losses and head metrics on held-out rows, without hints."""
    kept = ("use_cpu", "seed", "per_device_eval_batch_size", "max_length")
    args = SafeVlmTrainingArguments(
        output_dir=str(folder), report_to="none", **{name: overrides[name] for name in kept if name in overrides}
    )
    trainer = SafeVlmTrainer(
        model=model, args=args, eval_dataset=rows, processing_class=processor, compute_metrics=trainer_metrics
    )
    metrics = trainer.evaluate()
    return {
        name.removeprefix("eval_"): value
        for name, value in metrics.items()
        if not name.endswith(("runtime", "per_second", "epoch", "preparation_time"))
    }
