"""`safevlm train`: rows and pictures in, a trained and evaluated model out."""

import json
import logging
import os
from dataclasses import replace
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
from .data.labels_file import labels_dict
from .encoding.row_checks import RowCounts, check_counts, count_rows
from .evaluation import trainer_metrics
from .recipe import Recipe, check_overrides
from .schedule import run_schedule
from .settings_without_effect import check_before_training
from .stage.trainer import SafeVlmTrainer
from .stage.training_args import SafeVlmTrainingArguments

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
    labels: str | os.PathLike | None = None,
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
        labels: Names of categories and levels for a base that has none, instead of the recipe's; see [`load_labels`].
        reading: `format`, `taxonomy`, `split`, `subset`, `revision` of [`read_rows`], for all of `data`.
    """
    output_dir = Path(output_dir)
    options = dict(holdout=holdout, assume_safe=assume_safe, dtype=dtype, seed=seed, labels=labels, **reading)
    if on_error == "skip":
        options["skip_bad_rows"] = True
    command = train_command(base, data, images, recipe, output_dir, options, overrides)
    recipe = _recipe(recipe, labels)
    _check_call(recipe, holdout, dtype, overrides or {})
    config = AutoConfig.from_pretrained(base)
    check_before_training(recipe, overrides or {}, seed, config if isinstance(config, SafeVlmConfig) else None)
    labels = _labels_for(config, recipe, asked=labels)
    rows, skipped = _read(data, images, labels=labels, assume_safe=assume_safe, on_error=on_error, **reading)
    train_rows, eval_rows = split_holdout(rows, holdout, seed=seed) if holdout else (rows, None)
    counts = count_rows(train_rows)
    check_counts(counts)
    model, processor = _safe_model(base, config, recipe, dtype, seed, overrides or {})
    overrides = {"seed": seed, "data_seed": seed, "use_cpu": not torch.cuda.is_available(), **(overrides or {})}
    card = output_dir / "model" / CARD
    words = card.read_text(encoding="utf-8") if card.is_file() else None
    model, metrics = _train(model, processor, train_rows, eval_rows, output_dir, recipe, overrides)
    report = {**_row_numbers(counts, eval_rows, skipped), "metrics": metrics, "model": str(card.parent)}
    if PartialState().is_main_process:
        if not card.is_file():  # the model is new
            training = {
                "command": command,
                **_row_facts(report, train_rows, labels),
                **data_facts(data, reading.get("revision")),
                "stages": stage_facts(output_dir, recipe, overrides),
            }
            results = head_results(report, training, model.config)
            _write_card(card, words, model_facts("SafeVLM", base_facts(base, config), training, results))
        (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _train(model, processor, train_rows, eval_rows, output_dir: Path, recipe: Recipe, overrides: dict):
    """The trained model, and the measures of its head after each stage."""
    metrics = {}

    def after_stage(folder: Path, model):
        if eval_rows is not None:
            metrics[folder.name.split("-", 1)[1]] = evaluate_head(model, processor, eval_rows, folder, overrides)

    options = dict(eval_rows=eval_rows, after_stage=after_stage, compute_metrics=trainer_metrics)
    return run_schedule(model, processor, train_rows, output_dir, recipe, **options, **overrides), metrics


def _row_facts(report: dict, train_rows, labels: SafetyLabels) -> dict:
    return {
        "rows": report["num_train_rows"],
        "held_out": report["num_eval_rows"],
        "skipped": len(report["skipped"]),
        **row_counts(train_rows, labels),
    }


def _write_card(card: Path, words: str | None, facts: dict):
    if words is not None:
        card.write_text(words, encoding="utf-8")  # what a person wrote in the former one stays
    write_card(card.parent, facts, model_id="model")


def _recipe(name: str | os.PathLike, labels) -> Recipe:
    recipe = Recipe.load(name)
    return recipe if labels is None else replace(recipe, safety={**recipe.safety, **labels_dict(load_labels(labels))})


def _labels_for(config, recipe: Recipe, asked) -> SafetyLabels:
    if isinstance(config, SafeVlmConfig):
        own = config.labels
        if asked is not None and load_labels(asked) != own:
            raise ValueError(f"`labels` {str(asked)!r} are not those of the base, a SafeVLM: {labels_dict(own)}.")
        return own
    get_backbone(config)  # a clear error before anything is read
    return load_labels({"safety": recipe.safety})


def _row_numbers(counts: RowCounts, eval_rows, skipped) -> dict:
    return {
        "num_train_rows": counts.rows,
        "num_unlabelled_rows": counts.rows - counts.labelled,
        "num_eval_rows": len(eval_rows or []),
        "skipped": [{"row": row, "reason": reason} for row, reason in skipped],
    }


def _check_call(recipe: Recipe, holdout: float, dtype: str, overrides: dict):
    if not 0 <= holdout < 1:
        raise ValueError(f"`holdout` must be in [0, 1), got {holdout}.")
    check_overrides(overrides)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"`dtype` must be 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}.")
    for stage in recipe.stages:
        strategy = {**stage, **overrides}.get("eval_strategy", "no")
        if not holdout and strategy not in ("no", False):
            raise ValueError(f"`eval_strategy={strategy}` needs rows to evaluate on; hold some out (`--holdout 0.1`).")


def _read(data, images, **options) -> tuple[list, list]:
    """All rows and what was skipped."""
    parts = [read_rows(path, images, **options) for path in data]
    rows = [row for part in parts for row in part]
    skipped = [problem for part in parts for problem in part.skipped]
    if not rows:
        raise ValueError(f"No row to train on in {', '.join(map(str, data))} ({len(skipped)} skipped).")
    return rows, skipped


def _safe_model(base, config, recipe: Recipe, dtype: str, seed: int, overrides: dict):
    """A SafeVLM and its processor: the one in `base`, or fresh safety modules on it."""
    if dtype == "auto" and config.dtype == torch.float16:
        if any({**stage, **overrides}.get("bf16") for stage in recipe.stages):
            dtype = "bfloat16"
    set_seed(seed)
    if isinstance(config, SafeVlmConfig):
        processor = SafeVlmProcessor.from_pretrained(base)
        return SafeVlmForConditionalGeneration.from_pretrained(base, dtype=dtype), processor
    processor = SafeVlmProcessor.from_base(base, config=SafeVlmConfig(**recipe.safety))
    model = SafeVlmForConditionalGeneration.from_base(base, processor, base_kwargs={"dtype": dtype}, **recipe.safety)
    return model, processor


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
