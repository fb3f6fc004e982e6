"""Facts for the model card, from what training and evaluation wrote. Their form is in `model_card/facts.py`."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError

from safevlm.files import file_sha256, is_hub_id
from safevlm.model_card import write_card
from safevlm.model_card.facts import policy_mark, portable_command, portable_word, read_facts
from safevlm.safety_labels import SafetyLabels

from .data.mix_output import MANIFEST, MANIFEST_FORMAT, input_hashes
from .evaluation.environment import environment
from .evaluation.measure_table import Measure, head_measures
from .recipe import Recipe
from .stage.card_callback import read_measured
from .stage.training_args import STAGES

VERSIONS = ("safevlm", "torch", "transformers", "lmms_eval")
PLOTS = {
    "trade_off.png": "Over-blocking: recall of risky rows against clean rows flagged, for each policy",
    "reliability.png": "Reliability of scores before and after calibration",
    "risk_scores.png": "Risk scores of risky and clean rows",
    "confusion_matrix.png": "Categories and levels: labels against verdicts",
    "roc_pr.png": "ROC and precision-recall curves of the risk score",
}


# -- training


def model_facts(model_name: str, base: dict, training: dict, results: list[dict]) -> dict:
    """All facts of a model fresh from training. The base's licence is the model's, unless its publisher says more."""
    known = {"license": base["license"], "license_source": "that of the base model"} if base.get("license") else {}
    return {"model_name": model_name, "base_model": base, **known, "training": training, "results": results}


def head_results(report: dict, training: dict, config) -> list[dict]:
    """The head's measures on the rows that `train_from_files` held out, after each stage."""
    columns = report["metrics"]
    num_assessed = max((column.get("num_assessed", 0) for column in columns.values()), default=0)
    measures = card_measures(columns, head_measures("card"), num_assessed)
    if not measures:
        return []
    held_out = f"{report['num_eval_rows']} rows held out of the training data, by image"
    data = f"{held_out}; arg max of the head, before any policy"
    result = {"title": "Safety head on held-out rows", "system": list(columns)[-1], "measures": measures}
    return [{**result, **origin(environment(), data, training["command"])}]


def base_facts(base: str | os.PathLike, config) -> dict:
    """Name, commit or file hashes, and licence of a base model; `config` is its loaded configuration."""
    folder = Path(base)
    if not folder.is_dir():
        revision = getattr(config, "_commit_hash", None)
        return {"name": str(base), "revision": revision, "license": hub_license(str(base), revision)}
    return {
        "name": portable_word(str(folder)) if folder.is_absolute() else folder.resolve().name,
        "license": _license_of(folder / "README.md"),
        "files": {path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))},
    }


def hub_license(repo_id: str, revision: str | None = None, repo_type: str = "model") -> str | None:
    """The licence in the card of a repository; `None` where there is none, or the card cannot be had (offline)."""
    try:
        return _license_of(Path(hf_hub_download(repo_id, "README.md", revision=revision, repo_type=repo_type)))
    except (EntryNotFoundError, HfHubHTTPError, HTTPError, OSError, ValueError):
        return None


def _license_of(card: Path) -> str | None:
    """The licence in a card's metadata, which somebody else wrote: anything else than a text counts as unknown."""
    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        data = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (UnicodeDecodeError, yaml.YAMLError, IndexError):
        return None
    if not isinstance(data, dict):
        return None
    name = data.get("license_name") if data.get("license") == "other" else data.get("license")
    return name if isinstance(name, str) else None


def data_facts(paths: Sequence[str | os.PathLike], revision: str | None = None) -> dict:
    """`data` and `mixes`: every file trained on with its SHA-256, Hub sets with their revision, mixes' manifests."""
    data, mixes = [], []
    for path in map(Path, paths):
        if not path.exists() and is_hub_id(str(path)):
            license = hub_license(str(path), revision, "dataset")
            data.append({"name": str(path), "sha256": None, "revision": revision, "license": license})
            continue
        for name, digest in input_hashes(path.name, path.resolve().parent).items():
            data.append({"name": name, "sha256": digest})
        manifest = path.parent / MANIFEST
        if path.is_file() and manifest.is_file():
            found = json.loads(manifest.read_text(encoding="utf-8"))
            if isinstance(found, dict) and found.get("format") == MANIFEST_FORMAT:
                if data[-1]["sha256"] in [split["sha256"] for split in found["splits"].values()]:
                    mixes.append({"file": path.name, "seed": found["recipe"]["seed"], "sources": found["sources"]})
    return {"data": data, "mixes": mixes}


def row_counts(rows, labels: SafetyLabels) -> dict:
    """Rows per category and per level, in the order of the labels."""
    categories, levels = Counter(row.category for row in rows), Counter(row.level for row in rows)
    return {
        "categories": {name: categories[i] for i, name in enumerate(labels.category_names)},
        "levels": {name: levels[i] for i, name in enumerate(labels.level_names)},
    }


def stage_facts(output_dir: str | os.PathLike, recipe: Recipe) -> list[dict]:
    """Hyper-parameters and measurements of each stage that `run_schedule` trained in `output_dir`."""
    facts = []
    for folder, stage in zip(recipe.folders(output_dir), recipe.stages, strict=True):
        trainable = ["safety"] if folder.stage == STAGES[0] else ["safety", "language_model"]
        arguments = {"trainable": trainable, **stage}
        for argument in ("safety_level_loss_coef", "safety_category_loss_coef"):
            if argument in recipe.safety:
                arguments.setdefault(argument, recipe.safety[argument])
        arguments = json.loads(json.dumps(arguments, default=str))
        facts.append({"stage": folder.stage, "arguments": arguments, "measured": read_measured(folder.path)})
    return facts


def card_measures(
    columns: dict[str, dict[str, float | None]],
    measures: Iterable[Measure],
    n: int | None = None,
    task: str | None = None,
) -> list[dict]:
    """
    The rows of a card's table: each of `measures` that a column has a value of.

    Args:
        columns (`dict[str, dict[str, float | None]]`): The values by name of the measure, for each system.
        n (`int`, *optional*): How many rows of data the values rest on.
        task (`str`, *optional*): The data set, for the card's metadata.
    """
    return [
        card_measure(measure, {system: values.get(measure.name) for system, values in columns.items()}, n, task)
        for measure in measures
        if any(values.get(measure.name) is not None for values in columns.values())
    ]


def card_measure(
    measure: Measure,
    values: dict[str, float | None],
    n: int | None = None,
    task: str | None = None,
    title: str | None = None,
) -> dict:
    """One row of a card's table; `values` by system. Shares are stored in [0, 1], whatever the measure's scale."""
    scale = measure.scale if measure.percent else 1.0
    return {
        "name": measure.name,
        "title": title or measure.title,
        **({"task": task} if task else {}),
        "section": measure.section,
        "n": n,
        "percent": measure.percent,
        "higher_is_better": measure.higher_is_better,
        "values": {system: None if value is None else value / scale for system, value in values.items()},
    }


def origin(environment: dict, data: str, command: str, policy: dict | None = None) -> dict:
    """What stands beside every number."""
    return {
        "data": data,
        "command": portable_command(command),
        "device": environment["device"],
        "date": environment["date"],
        "versions": {name: environment[name] for name in VERSIONS if environment.get(name)},
        **({} if policy is None else {"policy": policy_mark(policy)}),
    }


# -- evaluation and calibration


def add_evaluation(model_dir: str | os.PathLike, results_dir: str | os.PathLike) -> Path:
    """Adds what `safevlm evaluate` wrote to the card of the model that it evaluated; returns the card's path."""
    from .evaluation.benchmarks.comparison import cell, columns, num_items

    model_dir, results_dir = Path(model_dir), Path(results_dir)
    path = results_dir / "results.json"
    report = _report(path, "evaluate")
    facts, config = read_facts(model_dir), json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    own = [name for name, system in report["systems"].items() if _is_plain(system["system"], model_dir)]
    if not own:
        asked = sorted({system["system"]["checkpoint"] for system in report["systems"].values()})
        raise ValueError(f"{path} is about {', '.join(asked)}, not about {str(model_dir)!r} under its own policy.")
    measures = [
        card_measure(
            column.measure,
            {name: cell(report, name, column) for name in report["systems"]},
            num_items(report, column),
            ", ".join(column.tasks),
            column.title,
        )
        for column in columns(report)
    ]
    heads = {name: system["head"]["overall"] for name, system in report["systems"].items() if "head" in system}
    measures += _interval_measures(heads, task=", ".join(report["tasks"]))
    # Changed since: the answers were given under a policy that this folder does not hold any more.
    policy = config["safety_policy"]
    if (model_dir / "config.json").stat().st_mtime > path.stat().st_mtime:
        policy = {"name": "an earlier one"}
    settings = report["settings"]
    limit = "" if settings["limit"] is None else f", the first {settings['limit']} items of each"
    result = {
        "title": "Benchmarks",
        "system": own[0],
        "measures": measures,
        **origin(
            report["environment"],
            f"local copies of {', '.join(report['tasks'])}{limit}; judge {settings['judge']}",
            report["command"],
            policy,
        ),
    }
    facts["results"] = [*(r for r in facts.get("results") or () if r["title"] != result["title"]), result]
    plots = {"comparison.png": "Safety against usefulness of the systems compared"}
    _add_plots(facts, model_dir, results_dir, plots, calibration=False)
    return write_card(model_dir, facts)


def _is_plain(system: dict, model_dir: Path) -> bool:
    """Whether a system is the model itself, under its own policy."""
    same = Path(system["checkpoint"]).resolve() == model_dir.resolve()
    return same and not any(system.get(name) for name in ("policy", "prefix", "guard"))


def _interval_measures(reports: dict[str, dict], task: str | None = None) -> list[dict]:
    """Measures of a card from the `overall` of head reports: values with their 95 % intervals."""
    values = {name: {key: entry["value"] for key, entry in report.items()} for name, report in reports.items()}
    measures = card_measures(values, head_measures("card"), task=task)
    for measure in measures:
        key = measure["name"]
        entries = {name: report[key] for name, report in reports.items() if key in report}
        measure["n"] = max(entry["num_rows"] for entry in entries.values())
        measure["intervals"] = {
            name: [entry["low"], entry["high"]] for name, entry in entries.items() if entry["low"] is not None
        }
    return measures


def add_calibration(model_dir: str | os.PathLike, calibration_dir: str | os.PathLike) -> Path:
    """Adds what `safevlm calibrate` wrote to the card of the model that it calibrated; returns the card's path."""
    model_dir, calibration_dir = Path(model_dir), Path(calibration_dir)
    path = calibration_dir / "calibration.json"
    report = _report(path, "calibrate")
    if Path(report["model"]).resolve() != model_dir.resolve():
        raise ValueError(f"{path} is about {report['model']!r}, not about {str(model_dir)!r}.")
    measures = _interval_measures({when: report[when]["overall"] for when in ("before", "after")})
    files = []
    for path in map(Path, report["data"]):
        files.append(f"{path.name} (SHA-256 {file_sha256(path)})" if path.is_file() else path.name)
    facts = read_facts(model_dir)
    facts["calibration"] = {
        "aim": report["aim"],
        "fit": report["fit"],
        "report": report["report"],
        "warnings": report["warnings"],
        "measures": measures,
        **origin(
            report["environment"],
            ", ".join(files),
            report.get("command") or _calibrate_command(report),
            report["after"]["policy"],
        ),
    }
    _add_plots(facts, model_dir, calibration_dir, PLOTS, calibration=True)
    return write_card(model_dir, facts)


def _calibrate_command(report: dict) -> str:
    (aim, value), *_ = report["aim"].items()
    words = ["safevlm", "calibrate", "--model", report["model"], "--data", *report["data"]]
    return portable_command([*words, f"--{aim.replace('_', '-')}", value, "--seed", report["seed"]])


def _add_plots(facts: dict, model_dir: Path, source: Path, titles: dict[str, str], calibration: bool):
    kept = [plot for plot in facts.get("plots") or () if Path(plot["file"]).name not in titles]
    for name, title in titles.items():
        if (source / name).is_file():
            (model_dir / "plots").mkdir(exist_ok=True)
            shutil.copyfile(source / name, model_dir / "plots" / name)
            kept.append({"file": f"plots/{name}", "title": title, "calibration": calibration})
    facts["plots"] = kept


def _report(path: Path, command: str) -> dict:
    if not path.is_file():
        raise ValueError(f"{str(path.parent)!r} holds no {path.name}; pass the --output of `safevlm {command}`.")
    return json.loads(path.read_text(encoding="utf-8"))
