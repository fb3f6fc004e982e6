"""Every command's `--help` ends with an example, and the command takes it."""

import argparse
import shlex

import pytest

from safevlm.trainer import cli


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """All commands by what one types, those that only group others included."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= {command.prog: command, **commands(command)}
    return found


COMMANDS = commands(cli.build_parser())


def test_all_commands_are_found():
    assert {"safevlm demo", "safevlm train", "safevlm data", "safevlm data mix", "safevlm push"} <= COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_that_the_command_takes(name):
    parser = COMMANDS[name]
    example = parser.format_help().rstrip().splitlines()[-1].strip()
    assert example.startswith(name + " ") or example == name
    arguments = cli.build_parser().parse_args(shlex.split(example)[1:])
    assert callable(arguments.run)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_is_explained(name):
    unexplained = [action.dest for action in COMMANDS[name]._actions if action.help is None]
    assert unexplained in ([], ["data_command"])
