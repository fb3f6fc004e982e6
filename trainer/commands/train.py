"""`safevlm train`: both stages on the user's data."""

from safevlm.trainer.options import add_options, options_from
from safevlm.trainer.training_options import TrainOptions

from .common import add_command, model_config, print_json


def add(commands):
    command = add_command(
        commands,
        "train",
        run,
        "Add safety modules to a base model and train both stages; repeat the command to resume.",
        example="safevlm train --base llava-hf/llava-1.5-7b-hf --data rows.jsonl --images pictures --output out",
    )
    add_options(command, TrainOptions)


def run(args):
    options = options_from(args, TrainOptions)
    model_config(options.base, "--base")
    from accelerate import PartialState

    from safevlm.trainer.training_run import train_from_files

    report = train_from_files(options)
    if PartialState().is_main_process:
        print_json(report)
