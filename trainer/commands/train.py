"""`safevlm train`: both stages on the user's data."""

from pathlib import Path

import yaml

from safevlm.trainer.settings import load_settings

from .common import add_command, add_labels_argument, add_reader_arguments, model_config, print_json, reader_options


def add(commands):
    command = add_command(
        commands,
        "train",
        run,
        "Add safety modules to a base model and train both stages; repeat the command to resume.",
        example="safevlm train --base llava-hf/llava-1.5-7b-hf --data rows.jsonl --images pictures --output out",
    )
    command.add_argument("--base", required=True, help="Hub id or folder of a vision-language model, or of a SafeVLM")
    command.add_argument(
        "--data", required=True, nargs="+", help="rows: files (JSON, JSONL, csv, parquet), folders, zips or Hub ids"
    )
    add_reader_arguments(command)
    add_labels_argument(command)
    command.add_argument(
        "--output", required=True, type=Path, help="folder to write; the model ends up in OUTPUT/model"
    )
    command.add_argument("--recipe", default="paper", help="a shipped recipe or a YAML file (default: paper)")
    command.add_argument(
        "--holdout", type=float, default=0.1, help="share of rows to evaluate on (default: 0.1; 0: none)"
    )
    command.add_argument("--skip-bad-rows", action="store_true", help="skip and count rows with problems")
    command.add_argument("--dtype", default="auto", help="weights' dtype: auto, float32, bfloat16 (default: auto)")
    command.add_argument("--seed", type=int, default=0, help="of weights, order and hold-out (default: 0)")
    command.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="training arguments for all stages, e.g. max_steps=100 learning_rate=1e-4",
    )


def run(args):
    overrides = dict(_override(item) for item in args.set)
    model_config(args.base, "--base")
    from accelerate import PartialState

    from safevlm.trainer.training_run import train_from_files

    report = train_from_files(
        base=args.base,
        data=args.data,
        output_dir=args.output,
        recipe=args.recipe,
        holdout=args.holdout,
        on_error="skip" if args.skip_bad_rows else "raise",
        dtype=args.dtype,
        seed=args.seed,
        overrides=overrides,
        images=args.images,
        labels=args.labels,
        **reader_options(args),
    )
    if PartialState().is_main_process:
        print_json(report)


def _override(item: str) -> tuple[str, object]:
    name, equals, value = item.partition("=")
    if not equals:
        raise ValueError(f"--set {item!r} must be NAME=VALUE, such as max_steps=100.")
    try:
        return name, load_settings(value)
    except yaml.YAMLError:
        raise ValueError(f"--set {item!r}: the value is no valid YAML.") from None
