"""`safevlm calibrate`: temperatures and thresholds of a policy, fitted on labelled rows."""

import json
import shlex
import sys
from pathlib import Path

from .common import (
    add_command,
    add_model_arguments,
    add_reader_arguments,
    check_model_type,
    check_policy,
    load_model,
    reader_options,
)


def add(commands):
    command = add_command(
        commands,
        "calibrate",
        run,
        "Fit a policy's temperatures and thresholds on half of the rows and report on the other half.",
        example="safevlm calibrate --model out/model --data dev.jsonl --images dev --target-fpr 0.05 --output cal",
    )
    add_model_arguments(command)
    command.add_argument(
        "--data", required=True, nargs="+", help="labelled rows not trained on: files, folders, zips or Hub ids"
    )
    add_reader_arguments(command)
    aim = command.add_mutually_exclusive_group(required=True)
    aim.add_argument("--target-fpr", type=float, help="largest share of clean rows to flag, such as 0.05")
    aim.add_argument("--cost-ratio", type=float, help="what missing a risky row costs, in flagged clean rows, e.g. 5")
    command.add_argument(
        "--output",
        required=True,
        type=Path,
        help="folder for policy.yaml, calibration.json, plots and predictions.jsonl, from which a run resumes",
    )
    command.add_argument("--apply", action="store_true", help="also make it the policy of the model in MODEL")
    command.add_argument("--skip-bad-rows", action="store_true", help="skip and count rows with problems")
    command.add_argument("--batch-size", type=int, default=16, help="rows assessed at once (default: 16)")
    command.add_argument("--seed", type=int, default=0, help="which half of the images is fitted on (default: 0)")


def run(args):
    if args.apply and not (Path(args.model) / "config.json").is_file():
        raise ValueError(f"--apply needs a model folder on this machine, got --model {args.model!r}.")
    check_policy(args.policy)
    check_model_type(args.model, "--model")
    from safevlm.policy_file import write_policy
    from safevlm.trainer.card_facts import add_calibration
    from safevlm.trainer.data import read_rows
    from safevlm.trainer.evaluation import calibrate, environment, plot_calibration, predict_rows, store_policy
    from safevlm.trainer.evaluation.eval_extra import require_head_packages
    from safevlm.trainer.evaluation.head.thresholds import check_aim

    require_head_packages()
    check_aim(args.target_fpr, args.cost_ratio)
    model, processor = load_model(args.model, args.device)
    labels = model.config.labels
    policy = model.resolve_policy(args.policy)
    parts = [
        read_rows(
            path,
            args.images,
            labels=labels,
            **reader_options(args),
            require_answer=False,
            on_error="skip" if args.skip_bad_rows else "raise",
        )
        for path in args.data
    ]
    rows = [row for part in parts for row in part]
    args.output.mkdir(parents=True, exist_ok=True)
    predictions = predict_rows(model, processor, rows, args.batch_size, path=args.output / "predictions.jsonl")
    calibration = calibrate(predictions, policy, labels, args.target_fpr, args.cost_ratio, args.seed)
    plot_calibration(calibration, labels, args.output)
    write_policy(calibration.policy, args.output / "policy.yaml")
    report = {
        "command": shlex.join(["safevlm", *sys.argv[1:]]),
        "model": args.model,
        "data": args.data,
        "skipped": [{"row": row, "reason": reason} for part in parts for row, reason in part.skipped],
        "environment": environment(),
        **calibration.report,
    }
    (args.output / "calibration.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.apply:
        store_policy(args.model, calibration.policy, model, processor)
        try:
            add_calibration(args.model, args.output)
        except ValueError as error:  # a README that is not safevlm's stays as it is
            sys.stderr.write(f"safevlm calibrate: the model card was not refreshed: {error}\n")
    sys.stdout.write(_summary(report, args))


def _summary(report: dict, args) -> str:
    from safevlm.trainer.evaluation.head.report import format_measure

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
    lines.append(f"risk_threshold: {report['thresholds']['global']:.4g}")
    lines += [
        f"  {name}: {about['threshold']:.4g} ({about['clean']} clean, {about['risky']} risky rows)"
        for name, about in report["thresholds"]["categories"].items()
        if about["own"]
    ]
    lines.append(f"\n{'% (95 % interval)':<20}{'recall of risky rows':<24}{'false-positive rate':<24}")
    lines += [
        f"{name:<20}{format_measure(point['recall']):<24}{format_measure(point['false_positive_rate'])}"
        for name, point in report["operating_points"].items()
    ]
    lines.append(f"\n{'% (95 % interval)':<20}{'before':<24}{'after':<24}")
    for name in ("ece", "category_ece", "auroc", "category_macro_f1", "level_accuracy"):
        before, after = (format_measure(report[when]["overall"][name]) for when in ("before", "after"))
        lines.append(f"{name:<20}{before:<24}{after}")
    lines.append(f"\nPolicy: {args.output / 'policy.yaml'}" + (f", now {args.model}'s own" if args.apply else ""))
    lines.append(f"Report and plots: {args.output}")
    return "\n".join(lines) + "\n"
