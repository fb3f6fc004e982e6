"""Settings of a run: read from YAML, and compared with those that the run was begun with."""

import json
import re
from pathlib import Path

import yaml

from safevlm.files import replace_json

RECIPES = Path(__file__).parent / "recipes"  # the shipped ones


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
        replace_json(path, settings)


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
