"""`safevlm data check | stats | mix`: look at data files, and build a training set of them."""

import argparse
import contextlib
import functools
import json
import logging
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from safevlm.trainer.data.read_options import ReadOptions, images_option
from safevlm.trainer.options import add_options, option, options_from

from .common import add_command, print_json

SHOWN = 10  # entries of a list that `stats` prints; stats.json has all

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

    check = add_command(
        actions,
        "check",
        run_check,
        "List every problem of some data files; the exit code is 1 if there is one.",
        example="safevlm data check rows.jsonl more.json --images pictures",
    )
    check.add_argument("files", nargs="+", metavar="DATA", help="data files, folders, zips or Hub ids")
    add_options(check, DataOptions, without=("on_error",))
    check.add_argument("--no-answers", action="store_true", help="rows need no answer, as in evaluation data")
    check.add_argument("--json", action="store_true", help="print the problems as JSON")

    stats = add_command(
        actions,
        "stats",
        run_stats,
        "Count rows by label and origin; find duplicates, near duplicates and leaks into test data.",
        example="safevlm data stats train.jsonl --against test.jsonl --images pictures --output stats",
    )
    stats.add_argument("files", nargs="+", metavar="DATA", help="data files, folders, zips or Hub ids")
    add_options(stats, DataOptions, without=("on_error",))
    stats.add_argument("--against", nargs="+", metavar="DATA", default=[], help="test data, which must share no image")
    stats.add_argument("--against-images", type=Path, help="images of the test data (default: as --images)")
    stats.add_argument("--against-split", help="split of the test data (default: as --split)")
    stats.add_argument("--near-distance", type=int, help="differing bits, of 256, of near duplicates (default: 24)")
    stats.add_argument("--output", type=Path, help="folder to write stats.json, with all lists, and stats.png to")
    stats.add_argument("--json", action="store_true", help="print everything as JSON")

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


def _reader(args, **changes):
    """`read(path)`: all rows that can be parsed, with or without answer; their images are not looked at yet."""
    from safevlm.trainer.data import load_labels, read_rows

    given = options_from(args, DataOptions)
    options = replace(
        given.read, labels=load_labels(given.labels), check_images="none", require_answer=False, on_error="skip"
    )
    return functools.partial(read_rows, **{"image_folder": given.images, "options": options, **changes})


def run_check(args):
    from safevlm.trainer.data.check import check_files

    with _without_warnings("safevlm.trainer.data"):  # of skipped rows, which the report lists
        report = check_files(args.files, _reader(args), require_answer=not args.no_answers)
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
    from safevlm.trainer.data import load_labels
    from safevlm.trainer.data.fingerprints import NEAR_DISTANCE, ImageIndex
    from safevlm.trainer.data.stats import data_stats
    from safevlm.trainer.data.stats_plot import draw_stats

    files = [_reader(args)(path) for path in args.files]
    read_test = _reader(args, image_folder=args.against_images or args.images, split=args.against_split or args.split)
    test_files = [read_test(path) for path in args.against]
    rows, tests = [row for file in files for row in file], [row for file in test_files for row in file]
    distance = NEAR_DISTANCE if args.near_distance is None else args.near_distance
    index = ImageIndex([*rows, *tests], distance=distance)
    stats = {
        "files": args.files,
        "against": args.against,
        "skipped": [{"row": row, "reason": reason} for file in files + test_files for row, reason in file.skipped],
        "near_distance": distance,
        **data_stats(rows, tests, index, load_labels(args.labels)),
    }
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(stats, indent=2, ensure_ascii=False) + "\n"
        (args.output / "stats.json").write_text(text, encoding="utf-8")
        draw_stats(stats, args.output / "stats.png")
    if args.json:
        print_json(stats)
    else:
        where = "`--output FOLDER` writes all" if args.output is None else f"all are in {args.output / 'stats.json'}"
        lines = _stats_lines(stats, where)
        if args.output is not None:
            lines += ["", f"Written: {args.output / 'stats.json'}, {args.output / 'stats.png'}"]
        sys.stdout.write("\n".join(lines) + "\n")


def run_mix(args):
    from safevlm.trainer.data import load_labels
    from safevlm.trainer.data.labels_file import labels_dict
    from safevlm.trainer.data.mix import mix
    from safevlm.trainer.data.mix_recipe import MixRecipe

    is_file = args.recipe.endswith((".yaml", ".yml"))
    root = args.root or (Path(args.recipe).parent if is_file else Path())
    recipe = MixRecipe.load(args.recipe)
    if args.labels is not None:
        recipe = replace(recipe, labels=labels_dict(load_labels(args.labels)))
    manifest = mix(recipe, root, args.output)
    sys.stdout.write("\n".join(_mix_lines(manifest)) + "\n")
    images = args.output if recipe.images == "copy" else root
    sys.stdout.write(f"train with: --data {args.output / 'train.jsonl'} --images {images}\n")


def _stats_lines(stats: dict, where: str) -> list[str]:
    """`where` says how to get the lists whole."""
    images, duplicates = stats["images"], stats["duplicates"]
    lines = [
        f"{stats['rows']} rows, {len(stats['skipped'])} more that cannot be read; "
        f"{images['different']} different images, {images['unusable']} unusable",
        "",
        *_table(stats["categories_by_level"]),
        "",
    ]
    for title, counts in (
        ("sources", stats["sources"]),
        ("splits", stats["splits"]),
        ("risk in the question", stats["question_dependent"]),
        ("images per row", images["per_row"]),
        ("turns per row", stats["turns"]),
    ):
        lines.append(f"{title}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    for kind, lengths in stats["characters"].items():
        if lengths:
            lines.append(
                f"characters of {kind}: median {lengths['p50']:g}, 5-95 % {lengths['p5']:g}-{lengths['p95']:g}, "
                f"{lengths['min']:g} to {lengths['max']:g}"
            )
    lines += [
        "",
        f"duplicate rows: {duplicates['exact_rows']} exact, {duplicates['near_rows']} near "
        f"(images up to {stats['near_distance']} of 256 bits apart); "
        f"rows with the image and question of another, but other labels: {duplicates['conflicting_rows']}",
        *_some([f"{entry['row']} says the same as {entry['like']}" for entry in duplicates["rows"]], where),
        f"groups of near-duplicate images: {len(duplicates['near_images'])}",
        *_some([" ~ ".join(names) for names in duplicates["near_images"]], where),
    ]
    if stats["leaks"] is None:
        return [*lines, "leaks into test rows: not looked for; name the test data with --against"]
    lines.append(f"leaks into test rows: {len(stats['leaks'])}")
    return lines + _some([_leak_line(leak) for leak in stats["leaks"]], where)


def _leak_line(leak: dict) -> str:
    test = "test" if leak["test_split"] == "unknown" else leak["test_split"]
    rows = f"{leak['row']} = {test} row {leak['test_row']}"
    if leak["kind"] == "text":
        return f"{rows} (same question, no image)"
    distance = "" if leak["distance"] is None else f", {leak['distance']} bits"
    other = "" if leak["test_image"] == leak["image"] else f" ~ {leak['test_image']}"
    return f"{rows} ({leak['kind']}{distance}): {leak['image']}{other}"


def _some(lines: list[str], where: str) -> list[str]:
    more = [f"  ... and {len(lines) - SHOWN} more; {where}"] if len(lines) > SHOWN else []
    return [f"  {line}" for line in lines[:SHOWN]] + more


def _table(counts: dict[str, dict[str, int]]) -> list[str]:
    """Categories by levels, with sums."""
    levels = list(next(iter(counts.values())))
    sums = [sum(row[level] for row in counts.values()) for level in levels]
    lines = [("", [*levels, "all"])]
    lines += [(category, [*row.values(), sum(row.values())]) for category, row in counts.items()]
    lines.append(("all", [*sums, sum(sums)]))
    width, column = max(map(len, [*counts, "all"])), max(7, *map(len, levels)) + 2
    return [f"{name:{width}} " + "".join(f"{cell:>{column}}" for cell in cells) for name, cells in lines]


def _mix_lines(manifest: dict) -> list[str]:
    lines = []
    for name, source in manifest["sources"].items():
        left_out = ", ".join(f"{count} {reason}" for reason, count in source["left_out"].items())
        lines.append(
            f"{name}: {source['read']} read, {source['chosen']} chosen" + (f"; {left_out}" if left_out else "")
        )
    for split in manifest["splits"].values():
        categories = ", ".join(f"{count} {name}" for name, count in split["categories"].items())
        lines.append(f"{split['file']}: {split['rows']} rows, {len(split['images'])} images ({categories})")
    if manifest["test_rows_skipped"]:
        lines.append(f"test rows that could not be read, and so not be compared with: {manifest['test_rows_skipped']}")
    return lines
