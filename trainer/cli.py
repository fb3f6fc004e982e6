"""The `safevlm` command. Its sub-commands are in `commands/`.

Nothing heavy is imported before a command needs it: help, `--version` and wrong arguments are answered at once. What
goes wrong later ends here, too, as one line.
"""

import argparse
import difflib
import logging
import os
import re
import signal
import sys
import textwrap

import yaml

from safevlm import __version__

from .commands import ask, calibrate, code, data, demo, evaluate, push, serve, space, train
from .commands.progress_bars import plain_progress

# Errors whose message is clear by itself. Of all others the type is shown, too.
CLEAR = (ValueError, OSError, ImportError, yaml.YAMLError)
LONGEST_MESSAGE = 2000


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit code. An error is one line, with a traceback only under `--verbose`."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    plain_progress()
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # until here it ended the process silently
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if args.verbose:
            raise
        sys.stderr.write(f"safevlm {args.command}: {_explain(error)}\n")
        return 1


def _explain(error: BaseException) -> str:
    """An error in one line."""
    if _interrupted(error):
        return "Interrupted; repeat the command to resume."
    message = textwrap.shorten(str(error), LONGEST_MESSAGE)
    if not message:
        return f"{type(error).__name__} (--verbose shows where)"
    return message if isinstance(error, CLEAR) else f"{type(error).__name__}: {message} (--verbose shows where)"


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is the cause: an interrupted import ends in an error of another kind."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


class _Parser(argparse.ArgumentParser):
    """A parser that suggests a correction for a misspelt command or choice, as Python 3.14's can."""

    def error(self, message: str):
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        close = choice and difflib.get_close_matches(choice[1], re.findall(r"[\w.-]+", choice[2]), n=1)
        super().error(f"{message}; did you mean {close[0]!r}?" if close else message)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="safevlm",
        description="Make a vision-language model safe: train, assess, answer.\n"
        "What a command does in full: safevlm COMMAND --help",
        epilog="Example:\n  safevlm demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"safevlm {__version__}", help="show the version")
    parser.set_defaults(run=lambda args: parser.print_help(), verbose=False)  # without a command
    commands = parser.add_subparsers(dest="command", metavar="command")
    for module in (demo, train, ask, calibrate, data, evaluate, push, code, space, serve):
        module.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
