"""The `safevlm` command. What each sub-command does is in `commands/`."""

import argparse
import logging
import os
import sys

import yaml

from .commands import ask, calibrate, code, data, demo, evaluate, push, serve, space, train


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code. Errors in what the user passed are one line, without a traceback."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return args.run(args) or 0
    except (ValueError, OSError, ImportError, yaml.YAMLError) as error:
        if args.verbose:
            raise
        sys.stderr.write(f"safevlm {args.command}: {' '.join(str(error).split())}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="safevlm",
        description="Make a vision-language model safe: train, assess, answer.",
        epilog="Example: safevlm demo",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in (demo, train, ask, calibrate, data, evaluate, push, code, space, serve):
        module.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
