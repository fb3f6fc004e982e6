"""What the commands share: checks of their arguments, loading a saved model, printing results."""

import argparse
import json
import sys
from pathlib import Path

from safevlm.files import read_json
from safevlm.safety_policy import SafetyPolicy
from safevlm.trainer.hub_config import hub_config
from safevlm.trainer.model_options import ModelOptions


def add_command(commands, name: str, run, summary: str, example: str) -> argparse.ArgumentParser:
    """
    Adds a command whose `--help` ends with `example`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
        run (`Callable[[argparse.Namespace], int | None]`): Does the work and returns the exit code; `None` is 0.
    """
    command = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"Example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--verbose", action="store_true", help="log progress, and show tracebacks of errors")
    command.set_defaults(run=run)
    return command


def load_model(options: ModelOptions):
    """The SafeVLM that the options name, and its processor."""
    check_model_type(options.model, "--model")
    check_device(options.device)
    hide_loading_bars()
    from safevlm.trainer.loading import load_checkpoint

    return load_checkpoint(options.model, options.device)


def hide_loading_bars():
    """Turns off the progress bars that transformers shows while it loads weights."""
    from transformers import logging

    logging.disable_progress_bar()


def check_policy(policy: str | None, argument: str = "--policy", value: str | None = None):
    """
    Reads a policy before anything heavy is imported or loaded.

    Args:
        policy (`str`, *optional*): A preset or a file.
        argument (`str`): The argument that named it, for the error.
        value (`str`, *optional*): The argument's whole value, if `policy` is a part of it.

    Raises:
        `ValueError`: There is no such policy, or it is invalid.
    """
    if policy is None:
        return None
    try:
        return SafetyPolicy.from_value(policy)
    except (ValueError, OSError) as error:
        raise ValueError(f"{argument} {(value or policy)!r}: {error}") from None


def check_device(device: str | None):
    """Raises `ValueError` if the device given as `--device` cannot be used here."""
    if device is None:
        return
    import torch

    try:
        torch.empty(0, device=device)
    except Exception as error:  # each kind of device raises its own
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"--device {device!r} cannot be used here: {reason}. Leave it out, or use cpu.") from None


def check_model_type(name: str, argument: str, revision: str | None = None):
    """Raises `ValueError` if the model `name`, given as `argument`, is not a SafeVLM."""
    model_type = model_config(name, argument, revision).get("model_type")
    if model_type != "safevlm":
        raise ValueError(
            f"{argument} {name!r} is of type {model_type!r}, not a SafeVLM; "
            f"make it one with: safevlm train --base {name} ..."
        )


def model_config(name: str, argument: str, revision: str | None = None) -> dict:
    """
    The content of a model's `config.json`.

    Args:
        name (`str`): Folder or Hub id.
        argument (`str`): The argument that named it, for errors.

    Raises:
        `ValueError`: There is no such model, or its files are damaged.
    """
    from safevlm.model_card.weights import WEIGHTS, check_weights

    folder = Path(name)
    if not folder.is_dir():
        return read_json(hub_config(name, argument, revision))
    if not (folder / "config.json").is_file():
        raise ValueError(f"{argument} {name!r} holds no config.json; name the folder of a saved model.")
    if weights := sorted(path.name for path in folder.glob(WEIGHTS)):
        check_weights(folder, weights)
    return read_json(folder / "config.json")


def print_json(value):
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
