"""What was measured: the results of evaluations, and the calibration."""

from collections.abc import Iterable

from safevlm.model_card.facts import SECTIONS, policy_mark
from safevlm.model_card.markdown import code, table, text

NOT_EVALUATED = "Not evaluated."
NOT_CALIBRATED = (
    "Not calibrated: the scores rank requests by risk, but a score of 0.8 need not mean that four out of five such "
    "requests are risky. `safevlm calibrate` fits the policy on labelled rows."
)


def results(facts: dict, config: dict) -> str:
    """A table for each evaluation, what was not evaluated, and plots."""
    parts = [_result(result, config) for result in facts.get("results") or ()]
    if parts:
        legend = "Rates in percent. ↑: higher is better; ↓: lower is better; *n*: number of rows."
        parts = [legend, *parts]
    if missing := [section for section in SECTIONS if section not in evaluated_sections(facts)]:
        parts.append(f"Not evaluated: {', '.join(missing)}." if parts else NOT_EVALUATED)
    parts += [_image(plot) for plot in _plots(facts, calibration=False)]
    return "\n\n".join(parts)


def evaluated_sections(facts: dict) -> set[str]:
    """Those of `SECTIONS` that there are measures for."""
    evaluated = {measure["section"] for result in facts.get("results") or () for measure in result["measures"]}
    return evaluated | ({"safety head"} if facts.get("calibration") else set())


def calibration(facts: dict, config: dict) -> str:
    """What the calibration aimed at, its measures before and after, and plots."""
    calibrated = facts.get("calibration")
    if not calibrated:
        return NOT_CALIBRATED
    rows = [
        [text(measure["title"]), *(_value(measure, system) for system in ("before", "after"))]
        for measure in calibrated["measures"]
    ]
    warnings = [f"- {text(warning)}" for warning in calibrated.get("warnings") or ()]
    parts = [
        f"Aim: {_aim(calibrated['aim'])}. Temperatures and thresholds were {_halves(calibrated)}. No image is in "
        f"both. Intervals are at 95 %.",
        table(["%", "before", "after"], rows, numbers=True),
        _origin(calibrated, config),
        *(["\n".join(warnings)] if warnings else []),
        *_images(list(_plots(facts, calibration=True))),
    ]
    return "\n\n".join(parts)


def _aim(aim: dict) -> str:
    if "target_fpr" in aim:
        return f"at most {100 * aim['target_fpr']:.4g} % of clean rows flagged"
    return f"least cost, where a missed risky row costs as much as {aim['cost_ratio']:.4g} flagged clean rows"


def _halves(calibrated: dict) -> str:
    return " and ".join(
        f"{verb} {half['rows']:,} rows ({half['risky']:,} of them risky) with {half['images']:,} images"
        for verb, half in (("fitted on", calibrated["fit"]), ("measured on", calibrated["report"]))
    )


def _result(result: dict, config: dict) -> str:
    counted = any(measure.get("n") is not None for measure in result["measures"])
    systems = list(dict.fromkeys(system for measure in result["measures"] for system in measure["values"]))
    own = result.get("system")
    header = [
        "",
        *(["*n*"] if counted else []),
        *(f"{text(name)} (this model)" if name == own and len(systems) > 1 else text(name) for name in systems),
    ]
    rows = []
    for section in SECTIONS:
        measures = [measure for measure in result["measures"] if measure["section"] == section]
        if measures:
            rows.append([f"*{section}*", *[""] * (len(header) - 1)])
        for measure in measures:
            arrow = {True: " ↑", False: " ↓", None: ""}[measure.get("higher_is_better")]
            title = text(measure.get("title") or measure["name"]) + arrow
            count = ["" if measure.get("n") is None else f"{measure['n']:,}"] if counted else []
            rows.append([title, *count, *(_value(measure, system) for system in systems)])
    return "\n\n".join([f"### {text(result['title'])}", table(header, rows, numbers=True), _origin(result, config)])


def _value(measure: dict, system: str) -> str:
    """A system's value, in percent unless the measure says otherwise, with its interval if it has one."""
    value = measure["values"].get(system)
    if value is None:
        return "–"
    scale = 100 if measure.get("percent", True) else 1
    shown = f"{scale * value:.{1 if scale == 100 else 2}f}"
    interval = (measure.get("intervals") or {}).get(system)
    return shown if not interval else f"{shown} ({scale * interval[0]:.1f}–{scale * interval[1]:.1f})"


def _origin(measured: dict, config: dict) -> str:
    """Where numbers come from. Says so if they were measured under another policy than the one in force."""
    versions = ", ".join(f"{text(name)} {text(version)}" for name, version in (measured.get("versions") or {}).items())
    revision = f"revision {code(measured['revision'])}" if measured.get("revision") else "revision not recorded"
    parts = [
        f"Data: {text(measured['data'])} ({revision})",
        f"command: {code(measured['command'])}",
        f"{text(measured['device'])}; {versions}" if versions else text(measured["device"]),
        text(measured["date"]),
    ]
    policy = measured.get("policy")
    if policy is not None and "sha256" not in policy:
        parts.append("**the policy was not recorded: numbers that depend on it may be out of date**")
    elif policy is not None and policy != policy_mark(config["safety_policy"]):
        parts.append(
            f"**measured under another policy ({code(policy['name'])}) than the one in force: numbers that depend on "
            f"the policy are out of date**"
        )
    return "; ".join(parts) + "."


def _plots(facts: dict, calibration: bool) -> Iterable[dict]:
    return (plot for plot in facts.get("plots") or () if bool(plot.get("calibration")) == calibration)


def _image(plot: dict) -> str:
    return f"![{text(plot['title'])}]({plot['file']})\n\n*{text(plot['title'])}*"


def _images(plots: list[dict]) -> list[str]:
    """Shows the first two plots, and folds the others."""
    shown, folded = [_image(plot) for plot in plots[:2]], [_image(plot) for plot in plots[2:]]
    return [*shown, *(["<details><summary>More plots</summary>", *folded, "</details>"] if folded else [])]
