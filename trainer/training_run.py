"""`safevlm train`: rows and pictures in, a trained and evaluated model with its card out."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoConfig, set_seed

from safevlm import SafeVlmConfig, SafeVlmForConditionalGeneration, SafeVlmProcessor
from safevlm.backbones import get_backbone
from safevlm.files import replace_json
from safevlm.model_card import write_card
from safevlm.model_card.card import CARD
from safevlm.model_card.facts import portable_command

from .card_facts import base_facts, data_facts, model_facts, row_counts, stage_facts
from .card_results import head_results
from .data import SafetyLabels, SafetyRow, load_labels, read_rows, split_holdout
from .data.labels_file import labels_dict
from .encoding.row_checks import check_counts, count_rows
from .evaluation import trainer_metrics
from .options import option_words
from .recipe import Recipe, StageFolder
from .schedule import run_schedule
from .settings_without_effect import check_before_training
from .stage.trainer import SafeVlmTrainer
from .stage.training_args import SafeVlmTrainingArguments
from .training_options import TrainOptions


def train_from_files(options: TrainOptions) -> dict:
    """
    Trains both stages and returns a report, which is also written to `OUTPUT/report.json`.

    `OUTPUT` gets `model/` and a folder for each stage, too. The same call resumes an interrupted run.
    """
    recipe = _load_recipe(options)
    config = AutoConfig.from_pretrained(options.base)
    trained_before = isinstance(config, SafeVlmConfig)
    check_before_training(recipe, options.overrides, options.seed, config if trained_before else None)
    labels = _labels(options, config, recipe)
    rows = _TrainingRows.read(options, labels)
    shared = {"seed": options.seed, "data_seed": options.seed, "use_cpu": not torch.cuda.is_available()}
    shared |= options.overrides
    recipe = recipe.with_arguments(**shared)
    model, processor = _safe_model(options, config, recipe)

    card = Path(options.output) / "model" / CARD
    previous_card = card.read_text(encoding="utf-8") if card.is_file() else None
    model, metrics = _train(model, processor, rows, options, recipe, shared)
    report = {**rows.report(), "metrics": metrics, "model": str(card.parent)}
    if PartialState().is_main_process:
        if not card.is_file():  # the model is new
            facts = _facts(options, recipe, config, labels, rows, report)
            if previous_card is not None:
                card.write_text(previous_card, encoding="utf-8")  # keeps what a person wrote in it
            write_card(card.parent, facts, model_id="model")
        replace_json(Path(options.output) / "report.json", report, ensure_ascii=True)
    return report


@dataclass(frozen=True)
class _TrainingRows:
    """
    The rows of a run.

    Args:
        train (`list[SafetyRow]`)
        held_out (`list[SafetyRow]`, *optional*): Rows to evaluate on.
        skipped (`list[tuple[str, str]]`): Id and reason of each row that was left out.
    """

    train: list[SafetyRow]
    held_out: list[SafetyRow] | None
    skipped: list[tuple[str, str]]

    @classmethod
    def read(cls, options: TrainOptions, labels: SafetyLabels) -> "_TrainingRows":
        """Raises `ValueError` if there is no row, or none that the safety head can learn from."""
        rows = read_rows(options.data, options.images, replace(options.read, labels=labels))
        if not rows:
            raise ValueError(
                f"No row to train on in {', '.join(map(str, options.data))} ({len(rows.skipped)} skipped)."
            )
        train, held_out = rows, None
        if options.holdout:
            train, held_out = split_holdout(rows, options.holdout, seed=options.seed)
        check_counts(count_rows(train))
        return cls(train, held_out, rows.skipped)

    def report(self) -> dict:
        """How many rows there are, and which ones were skipped."""
        counts = count_rows(self.train)
        return {
            "num_train_rows": counts.rows,
            "num_unlabelled_rows": counts.rows - counts.labelled,
            "num_eval_rows": len(self.held_out or []),
            "skipped": [{"row": row, "reason": reason} for row, reason in self.skipped],
        }


def _load_recipe(options: TrainOptions) -> Recipe:
    """The recipe, with `options.labels` as its labels. Raises `ValueError` for options that do not fit it."""
    recipe = Recipe.load(options.recipe)
    if options.labels is not None:
        recipe = replace(recipe, safety={**recipe.safety, **labels_dict(load_labels(options.labels))})
    if options.dtype != "auto" and not isinstance(getattr(torch, options.dtype, None), torch.dtype):
        raise ValueError(f"`dtype` must be 'auto', 'float32', 'bfloat16' or 'float16', got {options.dtype!r}.")
    for stage in recipe.with_arguments(**options.overrides).stages:
        strategy = stage.get("eval_strategy", "no")
        if not options.holdout and strategy not in ("no", False):
            raise ValueError(f"`eval_strategy={strategy}` needs rows to evaluate on; hold some out (`--holdout 0.1`).")
    return recipe


def _labels(options: TrainOptions, config, recipe: Recipe) -> SafetyLabels:
    """The labels of the base if it is a SafeVLM, otherwise the recipe's."""
    if not isinstance(config, SafeVlmConfig):
        get_backbone(config)  # a clear error before any row is read
        return load_labels({"safety": recipe.safety})
    if options.labels is not None and load_labels(options.labels) != config.labels:
        raise ValueError(
            f"`labels` {str(options.labels)!r} are not those of the base, a SafeVLM: {labels_dict(config.labels)}."
        )
    return config.labels


def _safe_model(options: TrainOptions, config, recipe: Recipe):
    """The SafeVLM to train and its processor: the base itself, or fresh safety modules on it."""
    dtype = options.dtype
    if dtype == "auto" and config.dtype == torch.float16 and any(stage.get("bf16") for stage in recipe.stages):
        dtype = "bfloat16"  # float16 weights cannot be mixed with bfloat16
    set_seed(options.seed)
    if isinstance(config, SafeVlmConfig):
        processor = SafeVlmProcessor.from_pretrained(options.base)
        return SafeVlmForConditionalGeneration.from_pretrained(options.base, dtype=dtype), processor
    processor = SafeVlmProcessor.from_base(options.base, config=SafeVlmConfig(**recipe.safety))
    model = SafeVlmForConditionalGeneration.from_base(
        options.base, processor, base_kwargs={"dtype": dtype}, **recipe.safety
    )
    return model, processor


def _train(model, processor, rows: _TrainingRows, options: TrainOptions, recipe: Recipe, shared: dict):
    """The trained model, and the measures of its head after each stage."""
    metrics = {}

    def after_stage(folder: StageFolder, model):
        if rows.held_out is not None:
            metrics[folder.stage] = evaluate_head(model, processor, rows.held_out, folder.path, shared)

    model = run_schedule(
        model,
        processor,
        rows.train,
        options.output,
        recipe,
        eval_rows=rows.held_out,
        after_stage=after_stage,
        compute_metrics=trainer_metrics,
    )
    return model, metrics


def evaluate_head(model, processor, rows, folder: Path, arguments: dict) -> dict[str, float]:
    """
    Losses and measures of the head on rows without hints.

    Args:
        folder (`Path`): For the trainer; nothing is written.
        arguments (`dict`): Training arguments. Only those that matter for evaluation are used.
    """
    used = ("use_cpu", "seed", "per_device_eval_batch_size", "max_length")
    args = SafeVlmTrainingArguments(
        output_dir=str(folder), report_to="none", **{name: arguments[name] for name in used if name in arguments}
    )
    trainer = SafeVlmTrainer(
        model=model, args=args, eval_dataset=rows, processing_class=processor, compute_metrics=trainer_metrics
    )
    return {
        name.removeprefix("eval_"): value
        for name, value in trainer.evaluate().items()
        if not name.endswith(("runtime", "per_second", "epoch", "preparation_time"))
    }


def _facts(options: TrainOptions, recipe: Recipe, config, labels: SafetyLabels, rows: _TrainingRows, report: dict):
    """Facts for the model card."""
    # Figures on the held-out rows stand beside the command, so `--holdout` is always in it.
    command = ["safevlm", "train", *option_words(options, always=("holdout",))]
    training = {
        "command": portable_command(command),
        "rows": report["num_train_rows"],
        "held_out": report["num_eval_rows"],
        "skipped": len(report["skipped"]),
        **row_counts(rows.train, labels),
        **data_facts(options.data, options.read.revision),
        "stages": stage_facts(options.output, recipe),
    }
    return model_facts("SafeVLM", base_facts(options.base, config), training, head_results(report, training, config))
