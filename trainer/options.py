"""Options declared once, as a dataclass: a command's flags with their `--help`, and the object the command passes on.

    @dataclass(frozen=True)
    class TrainOptions:
        base: str = option("Hub id or folder of a model")
        seed: int = option("seed of the weights", 0)

    add_options(parser, TrainOptions)                   # --base BASE, --seed SEED
    options_from(parser.parse_args(), TrainOptions)     # TrainOptions(base="...", seed=0)

Imports nothing heavy: `--help` is answered from here.
"""

import argparse
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields, is_dataclass
from pathlib import Path


def option(help: str, default=MISSING, flag: str | None = None, parse: Callable | None = None, **extras):
    """
    A field of a dataclass that is also a flag.

    Args:
        help (`str`): For `--help`, which adds the default.
        default (*optional*): A flag without a default is required.
        flag (`str`, *optional*): By default the field's name with dashes, such as `--skip-bad-rows`.
        parse (callable, *optional*): Makes the field's value of the flag's, for what argparse cannot.
        extras: Arguments of `ArgumentParser.add_argument` that do not follow from the field's type.
    """
    metadata = {"help": help, "flag": flag, "parse": parse, "extras": extras}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def add_options(
    parser: argparse.ArgumentParser, options: type, without: tuple[str, ...] = (), one_of: tuple[str, ...] = ()
):
    """
    Adds a flag for each field that [`option`] made.

    Args:
        options (`type`): A dataclass; the flags of dataclasses among its fields are added, too.
        without (`tuple[str]`): Names of fields that this command does not offer.
        one_of (`tuple[str]`): Names of fields exactly one of which must be given.
    """
    group = parser.add_mutually_exclusive_group(required=True) if one_of else None
    for declared, kind in _fields(options):
        if is_dataclass(kind):
            add_options(parser, kind, without)
        elif "help" in declared.metadata and declared.name not in without:
            place = group if declared.name in one_of else parser
            place.add_argument(_flag(declared), dest=declared.name, **_argument(declared, kind))


def options_from(args: argparse.Namespace, options: type):
    """The dataclass `options` with what the command was given; what the command does not offer has its default."""
    values = {}
    for declared, kind in _fields(options):
        if is_dataclass(kind):
            values[declared.name] = options_from(args, kind)
        elif "help" in declared.metadata and hasattr(args, declared.name):
            parse = declared.metadata["parse"] or (lambda value: value)
            values[declared.name] = parse(getattr(args, declared.name))
    return options(**values)


def option_words(options, always: tuple[str, ...] = ()) -> list[str]:
    """
    The words of a command line that ask for `options`.

    Args:
        always (`tuple[str]`): Names of fields that are included even with their default value.
    """
    words = []
    for declared, kind in _fields(type(options)):
        value = getattr(options, declared.name)
        if is_dataclass(kind):
            words += option_words(value, always)
        elif "help" in declared.metadata and (declared.name in always or value != _default(declared)):
            words += [_flag(declared), *_value_words(value, _argument(declared, kind))]
    return words


def _value_words(value, argument: dict) -> list[str]:
    if argument.get("action"):
        return []
    if isinstance(value, dict):
        return [f"{name}={'null' if item is None else item}" for name, item in value.items()]
    return [str(item) for item in (value if isinstance(value, (list, tuple)) else [value])]


def _fields(options: type) -> list[tuple[Field, type]]:
    """The fields of a dataclass with their types, `X` for `X | None`."""
    kinds = typing.get_type_hints(options)
    return [(declared, _without_none(kinds[declared.name])) for declared in fields(options)]


def _without_none(kind):
    if isinstance(kind, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _flag(declared: Field) -> str:
    return declared.metadata["flag"] or f"--{declared.name.replace('_', '-')}"


def _default(declared: Field):
    return declared.default if declared.default_factory is MISSING else declared.default_factory()


def _argument(declared: Field, kind) -> dict:
    """Arguments of `ArgumentParser.add_argument`."""
    default, help, extras = _default(declared), declared.metadata["help"], declared.metadata["extras"]
    argument = {"required": True} if default is MISSING else {"default": default}
    if kind is bool:
        argument["action"] = "store_true"
    elif typing.get_origin(kind) is list:
        argument["nargs"] = "+"
    elif kind in (int, float, Path):
        argument["type"] = kind
    argument |= extras
    if "action" not in argument and default is not MISSING and default not in (None, {}):
        help = f"{help} (default: {default})"
    return {**argument, "help": help}
