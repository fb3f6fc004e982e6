"""`safevlm calibrate`: temperatures and thresholds of a policy, fitted on labelled rows."""

import sys
from pathlib import Path

from safevlm.trainer.calibration_options import CalibrateOptions
from safevlm.trainer.options import add_options, options_from

from .common import add_command, check_device, check_model_type, check_policy, hide_loading_bars


def add(commands):
    command = add_command(
        commands,
        "calibrate",
        run,
        "Fit a policy's temperatures and thresholds on half of the rows and report on the other half.",
        example="safevlm calibrate --model out/model --data dev.jsonl --images dev --target-fpr 0.05 --output cal",
    )
    add_options(command, CalibrateOptions, one_of=("target_fpr", "cost_ratio"))


def run(args):
    options = options_from(args, CalibrateOptions)
    if options.apply and not (Path(options.model) / "config.json").is_file():
        raise ValueError(f"--apply needs a model folder on this machine, got --model {options.model!r}.")
    check_policy(options.policy)
    check_model_type(options.model, "--model")
    check_device(options.device)
    hide_loading_bars()
    from safevlm.trainer.calibration_run import calibrate_from_files, summary

    sys.stdout.write(summary(calibrate_from_files(options), options))
