"""Numbers on the model card: what training, `safevlm evaluate` and `safevlm calibrate` measured.

No number goes onto a card without its origin: data, command, device, date, and the policy it was measured under.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from safevlm.files import file_sha256, read_json
from safevlm.model_card import write_card
from safevlm.model_card.facts import policy_mark, portable_command, read_facts

from .evaluation.benchmarks.comparison import cell, columns, num_items
from .evaluation.environment import environment
from .evaluation.measure_table import Measure, head_measures

VERSIONS = ("safevlm", "torch", "transformers", "lmms_eval")
COMPARISON_PLOTS = {"comparison.png": "Safety against usefulness of the systems compared"}
CALIBRATION_PLOTS = {
    "trade_off.png": "Over-blocking: recall of risky rows against clean rows flagged, for each policy",
    "reliability.png": "Reliability of scores before and after calibration",
    "risk_scores.png": "Risk scores of risky and clean rows",
    "confusion_matrix.png": "Categories and levels: labels against verdicts",
    "roc_pr.png": "ROC and precision-recall curves of the risk score",
}
POLICY_NOT_RECORDED = {"name": "not recorded"}
"""For results of older releases, which do not say under which policy they were measured."""


def add_evaluation(model_dir: str | os.PathLike, results_dir: str | os.PathLike) -> Path:
    """
    Adds what `safevlm evaluate` wrote to the card of the model; returns the card's path.

    Args:
        model_dir: Folder of the model that was evaluated.
        results_dir: The `--output` of `safevlm evaluate`.

    Raises:
        `ValueError`: The results are not about this model under its own policy.
    """
    model_dir, results_dir = Path(model_dir), Path(results_dir)
    path = results_dir / "results.json"
    report = _report(path, "evaluate")
    own = [name for name, system in report["systems"].items() if _is_plain(system["system"], model_dir)]
    if not own:
        evaluated = sorted({system["system"]["checkpoint"] for system in report["systems"].values()})
        raise ValueError(f"{path} is about {', '.join(evaluated)}, not about {str(model_dir)!r} under its own policy.")
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
            report["systems"][own[0]].get("model_policy", POLICY_NOT_RECORDED),
        ),
    }
    facts = read_facts(model_dir)
    other_results = [other for other in facts.get("results") or () if other["title"] != result["title"]]
    facts["results"] = [*other_results, result]
    _add_plots(facts, model_dir, results_dir, COMPARISON_PLOTS, calibration=False)
    return write_card(model_dir, facts)


def add_calibration(model_dir: str | os.PathLike, calibration_dir: str | os.PathLike) -> Path:
    """
    Adds what `safevlm calibrate` wrote to the card of the model; returns the card's path.

    Args:
        model_dir: Folder of the model that was calibrated.
        calibration_dir: The `--output` of `safevlm calibrate`.

    Raises:
        `ValueError`: The calibration is not that of this model.
    """
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
            policy_mark(report["after"]["policy"]),
        ),
    }
    _add_plots(facts, model_dir, calibration_dir, CALIBRATION_PLOTS, calibration=True)
    return write_card(model_dir, facts)


def head_results(report: dict, training: dict, config) -> list[dict]:
    """The safety head's measures on the rows that `train_from_files` held out, after each stage."""
    columns = report["metrics"]
    num_assessed = max((column.get("num_assessed", 0) for column in columns.values()), default=0)
    measures = card_measures(columns, head_measures("card"), num_assessed)
    if not measures:
        return []
    held_out = f"{report['num_eval_rows']} rows held out of the training data, by image"
    data = f"{held_out}; arg max of the head, before any policy"
    result = {"title": "Safety head on held-out rows", "system": list(columns)[-1], "measures": measures}
    return [{**result, **origin(environment(), data, training["command"])}]


def card_measures(
    columns: dict[str, dict[str, float | None]],
    measures: Iterable[Measure],
    n: int | None = None,
    task: str | None = None,
) -> list[dict]:
    """
    The rows of a table on the card: one for each of `measures` that at least one system has a value for.

    Args:
        columns (`dict[str, dict[str, float | None]]`): System -> name of the measure -> value.
        measures (`Iterable[Measure]`)
        n (`int`, *optional*): Number of data rows behind the values.
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
    """One row of a table on the card. Percentages are stored in [0, 1], whatever the measure's scale."""
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
    """
    Where numbers come from; it must accompany them on the card.

    Args:
        environment (`dict`): What [`environment`] returns.
        data (`str`): What was measured on.
        command (`str`): What to type to measure it again.
        policy (`dict`, *optional*): The [`policy_mark`] of the policy in force.
    """
    return {
        "data": data,
        "command": portable_command(command),
        "device": environment["device"],
        "date": environment["date"],
        "versions": {name: environment[name] for name in VERSIONS if environment.get(name)},
        **({} if policy is None else {"policy": policy}),
    }


def _is_plain(system: dict, model_dir: Path) -> bool:
    """Whether a system is the model itself, under its own policy."""
    same = Path(system["checkpoint"]).resolve() == model_dir.resolve()
    return same and not any(system.get(name) for name in ("policy", "prefix", "guard"))


def _interval_measures(reports: dict[str, dict], task: str | None = None) -> list[dict]:
    """Rows of a table on the card from the `overall` part of head reports: values with their 95 % intervals."""
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
    return read_json(path)
