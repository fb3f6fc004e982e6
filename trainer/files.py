"""Writing files and folders so that a crash never leaves half of one, or a mix of two runs; settings in YAML."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml


def replace_folder(write: Callable[[Path], None], folder: Path) -> None:
    """Calls `write(partial_folder)`, which creates it, then puts that folder in the place of `folder`.

    A crash leaves the former `folder` whole, or, between two renames, none.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Writes `text` to `path`, making its folder; a crash leaves the former file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.replace(path)


def check_settings(path: Path, settings: dict, message: str, write: bool = True) -> None:
    """
    Compares the settings of a run that goes on in a folder with those in `path`, or notes them there if it is new.

    Args:
        settings (`dict`): Values that JSON does not know are compared as text.
        message (`str`): Of the error; `{changes}` in it is filled in.
        write (`bool`): Whether this process notes new settings; of several only one may.

    Raises:
        `ValueError`: They differ. Going on would end with results of neither.
    """
    settings = json.loads(json.dumps(settings, default=str))
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
        if changed:
            changes = [f"{name} was {found.get(name)!r}, now {settings.get(name)!r}" for name in changed]
            raise ValueError(message.replace("{changes}", ", ".join(changes)))  # paths may hold braces, too
    elif write:
        replace_text(path, json.dumps(settings, indent=2) + "\n")


class _SettingsLoader(yaml.SafeLoader):
    """PyYAML's, in which `1e-4` is the number that YAML 1.2 and people take it for, not a text."""


_SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$", re.ASCII), list("-+.0123456789")
)


def load_settings(text: str):
    """
    The value of a YAML text: a recipe, or what follows `NAME=`.

    Raises:
        `yaml.YAMLError`: It is no YAML.
    """
    return yaml.load(text, _SettingsLoader)
