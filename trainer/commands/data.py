"""`safevlm data check | stats | mix`: checks data files, describes them, or builds a training set from them."""

import argparse
import contextlib
import functools
import logging
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from safevlm.files import replace_json
from safevlm.trainer.data.read_options import ReadOptions, images_option
from safevlm.trainer.options import add_options, option, options_from

from .common import add_command, print_json

LABELS_HELP = "names of categories and levels, if not the paper's: a YAML or JSON file, a recipe, or a SafeVLM"


@dataclass(frozen=True)
class DataOptions:
    """How `data check` and `data stats` read. Bad rows never stop them, so they have no `--skip-bad-rows`."""

    images: Path | None = images_option()
    read: ReadOptions = field(default_factory=ReadOptions)
    labels: str | None = option(LABELS_HELP, None)


def add(commands):
    summary = "Check data files, describe them, or mix them into a training set."
    data = commands.add_parser(
        "data",
        help=summary,
        description=summary,
        epilog="Example:\n  safevlm data check rows.jsonl --images pictures",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data.set_defaults(run=lambda args: data.print_help(), verbose=False)  # without an action
    actions = data.add_subparsers(dest="data_command", metavar="action")
    _add_check(actions)
    _add_stats(actions)
    _add_mix(actions)


def _add_check(actions):
    check = add_command(
        actions,
        "check",
        run_check,
        "List every problem of some data files; the exit code is 1 if there is one.",
        example="safevlm data check rows.jsonl more.json --images pictures",
    )
    _add_data(check)
    check.add_argument("--no-answers", action="store_true", help="rows need no answer, as in evaluation data")
    check.add_argument("--json", action="store_true", help="print the problems as JSON")


def _add_stats(actions):
    stats = add_command(
        actions,
        "stats",
        run_stats,
        "Count rows by label and origin; find duplicates, near duplicates and leaks into test data.",
        example="safevlm data stats train.jsonl --against test.jsonl --images pictures --output stats",
    )
    _add_data(stats)
    stats.add_argument("--against", nargs="+", metavar="DATA", default=[], help="test data, which must share no image")
    stats.add_argument("--against-images", type=Path, help="images of the test data (default: as --images)")
    stats.add_argument("--against-split", help="split of the test data (default: as --split)")
    stats.add_argument(
        "--near-distance", type=int, help="bits, of 256, in which near duplicates may differ (default: 24)"
    )
    stats.add_argument("--output", type=Path, help="folder for stats.json, with the complete lists, and stats.png")
    stats.add_argument("--json", action="store_true", help="print everything as JSON")


def _add_mix(actions):
    mix = add_command(
        actions,
        "mix",
        run_mix,
        "Build a training set by recipe: balanced, without duplicates and leaks, a part held out; reproducible.",
        example="safevlm data mix recipe.yaml --root datasets --output mix",
    )
    mix.add_argument("recipe", help="a YAML file or a shipped recipe: paper-stage1, paper-stage2")
    mix.add_argument("--root", type=Path, help="folder that its paths are relative to (default: the recipe's own)")
    mix.add_argument("--labels", help=LABELS_HELP)
    mix.add_argument("--output", required=True, type=Path, help="folder to write: JSONL files and manifest.json")


def _add_data(command: argparse.ArgumentParser):
    command.add_argument("files", nargs="+", metavar="DATA", help="data files, folders, zips or Hub ids")
    add_options(command, DataOptions, without=("on_error",))


def _read_options(args) -> ReadOptions:
    """Options to read every row that can be parsed, with or without an answer, without opening its images."""
    from safevlm.trainer.data import load_labels

    options = options_from(args, DataOptions)
    return replace(
        options.read,
        labels=load_labels(options.labels),
        check_images="none",
        require_answer=False,
        on_error="skip",
    )


def run_check(args):
    from safevlm.trainer.data import read_rows
    from safevlm.trainer.data.check import check_files

    read = functools.partial(read_rows, image_folder=args.images, options=_read_options(args))
    with _without_warnings("safevlm.trainer.data"):  # about skipped rows: the report lists them
        report = check_files(args.files, read, require_answer=not args.no_answers)
    if args.json:
        print_json(report.to_dict())
    else:
        for problem in report.problems:
            sys.stdout.write(f"{problem}\n")
        sys.stdout.write(report.summary() + "\n")
    return 1 if report.problems else 0


@contextlib.contextmanager
def _without_warnings(package: str):
    logger = logging.getLogger(package)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def run_stats(args):
    from safevlm.trainer.data.stats_plot import draw_stats
    from safevlm.trainer.data.stats_text import stats_text

    stats = _stats(args)
    if args.output is not None:
        replace_json(args.output / "stats.json", stats)
        draw_stats(stats, args.output / "stats.png")
    if args.json:
        print_json(stats)
        return
    if args.output is None:
        text = stats_text(stats, "`--output FOLDER` writes all")
    else:
        json_file = args.output / "stats.json"
        text = stats_text(stats, f"all are in {json_file}") + f"\n\nWritten: {json_file}, {args.output / 'stats.png'}"
    sys.stdout.write(text + "\n")


def _stats(args) -> dict:
    """The statistics of the data, and what they are of."""
    from safevlm.trainer.data import read_rows
    from safevlm.trainer.data.fingerprints import NEAR_DISTANCE, ImageIndex
    from safevlm.trainer.data.stats import data_stats

    options = _read_options(args)
    rows = read_rows(args.files, args.images, options)
    tests = read_rows(
        args.against, args.against_images or args.images, options, split=args.against_split or args.split
    )
    distance = NEAR_DISTANCE if args.near_distance is None else args.near_distance
    index = ImageIndex([*rows, *tests], distance=distance)
    return {
        "files": args.files,
        "against": args.against,
        "skipped": [{"row": row, "reason": reason} for row, reason in rows.skipped + tests.skipped],
        "near_distance": distance,
        **data_stats(rows, tests, index, options.labels),
    }


def run_mix(args):
    from safevlm.trainer.data import load_labels
    from safevlm.trainer.data.labels_file import labels_dict
    from safevlm.trainer.data.mix import mix
    from safevlm.trainer.data.mix_output import mix_summary
    from safevlm.trainer.data.mix_recipe import MixRecipe

    is_file = args.recipe.endswith((".yaml", ".yml"))
    root = args.root or (Path(args.recipe).parent if is_file else Path())
    recipe = MixRecipe.load(args.recipe)
    if args.labels is not None:
        recipe = replace(recipe, labels=labels_dict(load_labels(args.labels)))
    manifest = mix(recipe, root, args.output)
    images = args.output if recipe.images == "copy" else root
    sys.stdout.write(mix_summary(manifest) + "\n")
    sys.stdout.write(f"train with: --data {args.output / 'train.jsonl'} --images {images}\n")
