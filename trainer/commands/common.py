"""What the commands share: their common arguments, how a saved model is loaded, how results are printed."""

import argparse
import json
import sys
from pathlib import Path


def add_command(commands, name: str, run, summary: str, example: str) -> argparse.ArgumentParser:
    """
    Adds a command whose `--help` ends with `example`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
        run (`Callable[[argparse.Namespace], int | None]`): Does the work; its result is the exit code, `None` is 0.
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


def add_model_arguments(command: argparse.ArgumentParser):
    command.add_argument("--model", required=True, help="folder or Hub id of a SafeVLM")
    command.add_argument("--policy", help="default, paper, strict, off, or a policy file (default: the model's own)")
    command.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")


def add_reader_arguments(command: argparse.ArgumentParser):
    """What a command needs to read data of any known format; `reader_options` passes it on."""
    command.add_argument("--images", type=Path, help="folder or zip of the images (default: each file's own folder)")
    command.add_argument("--format", help="the files' format (default: recognised from the content)")
    command.add_argument(
        "--taxonomy", help="how labels map to ours: a YAML file or a shipped name (default: the format's)"
    )
    command.add_argument("--split", help="the split to read of a set that has several")
    command.add_argument("--subset", help="configuration of a data set on the Hub")
    command.add_argument("--revision", help="branch, tag or commit of a data set on the Hub")
    command.add_argument("--assume-safe", action="store_true", help="rows without labels count as safe")


def reader_options(args) -> dict:
    """Arguments of `read_rows` from those of `add_reader_arguments`, but for the images'."""
    names = ("format", "taxonomy", "split", "subset", "revision", "assume_safe")
    return {name: getattr(args, name) for name in names}


def load_model(name: str, device: str | None = None):
    """A saved SafeVLM, ready to use, and its processor. A weak policy is told by the model itself, as a warning."""
    import torch
    from transformers import logging as transformers_logging

    from safevlm import SafeVlmForConditionalGeneration, SafeVlmProcessor

    transformers_logging.disable_progress_bar()
    check_model_type(name, "--model")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = SafeVlmForConditionalGeneration.from_pretrained(name, dtype="auto").to(device).eval()
    processor = SafeVlmProcessor.from_pretrained(name)
    model.check_policy_texts(processor)
    return model, processor


def check_model_type(name: str, argument: str, revision: str | None = None):
    """Raises if `name`, which the command got as `argument`, is not a SafeVLM; reads its configuration only."""
    from transformers import AutoConfig

    from safevlm import SafeVlmConfig

    model_type = AutoConfig.from_pretrained(name, revision=revision).model_type
    if model_type != SafeVlmConfig.model_type:
        raise ValueError(
            f"{argument} {name!r} is of type {model_type!r}, not a SafeVLM; "
            f"make one of it with: safevlm train --base {name} ..."
        )


def print_json(value):
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
