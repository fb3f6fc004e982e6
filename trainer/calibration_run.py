"""`safevlm calibrate`: labelled rows in, a policy with fitted temperatures and thresholds and its report out."""

import logging
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from safevlm.files import replace_json
from safevlm.policy_file import write_policy

from .calibration_options import CalibrateOptions
from .card_results import add_calibration
from .data import read_rows
from .evaluation import calibrate, environment, plot_calibration, predict_rows, store_policy
from .evaluation.eval_extra import require_head_packages
from .evaluation.head.report import format_measure
from .evaluation.head.thresholds import check_aim
from .loading import load_checkpoint

logger = logging.getLogger(__name__)


def calibrate_from_files(options: CalibrateOptions) -> dict:
    """Fits a policy and returns a report, which is also written to `OUTPUT/calibration.json`."""
    require_head_packages()
    check_aim(options.target_fpr, options.cost_ratio)
    model, processor = load_checkpoint(options.model, options.device)
    labels = model.config.labels
    policy = model.resolve_policy(options.policy)
    rows = read_rows(options.data, options.images, replace(options.read, labels=labels, require_answer=False))
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    predictions = predict_rows(model, processor, rows, options.batch_size, path=output / "predictions.jsonl")
    calibration = calibrate(predictions, policy, labels, options.target_fpr, options.cost_ratio, options.seed)
    plot_calibration(calibration, labels, output)
    write_policy(calibration.policy, output / "policy.yaml")
    report = {
        "command": shlex.join(["safevlm", *sys.argv[1:]]),
        "model": options.model,
        "data": options.data,
        "skipped": [{"row": row, "reason": reason} for row, reason in rows.skipped],
        "environment": environment(),
        **calibration.report,
    }
    replace_json(output / "calibration.json", report, ensure_ascii=True)
    if options.apply:
        store_policy(options.model, calibration.policy, model, processor)
        try:
            add_calibration(options.model, output)
        except ValueError as error:  # a README that safevlm did not write stays as it is
            logger.warning("the model card was not refreshed: %s", error)
    return report


def summary(report: dict, options: CalibrateOptions) -> str:
    """The report as a person reads it."""
    lines = [
        f"{part}: {counts['rows']} rows ({counts['risky']} risky, {counts['clean']} clean) about "
        f"{counts['images']} images"
        for part, counts in (("fitted on", report["fit"]), ("reported on", report["report"]))
    ]
    left_out = report["num_left_out"] + len(report["skipped"])
    if left_out:
        lines.append(f"left out: {left_out} rows without image or labels, or with problems")
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    lines += [
        f"{name}: {values['before']:.4g} -> {values['after']:.4g}" for name, values in report["temperatures"].items()
    ]
    lines += [*_threshold_lines(report["thresholds"]), *_measure_lines(report)]
    applied = f", now {options.model}'s own" if options.apply else ""
    lines.append(f"\nPolicy: {Path(options.output) / 'policy.yaml'}{applied}")
    lines.append(f"Report and plots: {options.output}")
    return "\n".join(lines) + "\n"


def _threshold_lines(thresholds: dict) -> list[str]:
    own = {name: category for name, category in thresholds["categories"].items() if category["own"]}
    return [
        f"risk_threshold: {thresholds['global']:.4g}",
        *(
            f"  {name}: {category['threshold']:.4g} ({category['clean']} clean, {category['risky']} risky rows)"
            for name, category in own.items()
        ),
    ]


def _measure_lines(report: dict) -> list[str]:
    """Two tables: the policies' operating points, and the head before and after calibration."""
    lines = [f"\n{'% (95 % interval)':<20}{'recall of risky rows':<24}{'false-positive rate':<24}"]
    lines += [
        f"{name:<20}{format_measure(point['recall']):<24}{format_measure(point['false_positive_rate'])}"
        for name, point in report["operating_points"].items()
    ]
    lines.append(f"\n{'% (95 % interval)':<20}{'before':<24}{'after':<24}")
    for name in ("ece", "category_ece", "auroc", "category_macro_f1", "level_accuracy"):
        before, after = (format_measure(report[when]["overall"][name]) for when in ("before", "after"))
        lines.append(f"{name:<20}{before:<24}{after}")
    return lines
