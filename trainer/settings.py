"""Settings of a run: read from YAML, and compared with those that the run was started with."""

import json
import re
from pathlib import Path

import yaml

from safevlm.files import replace_json

RECIPES = Path(__file__).parent / "recipes"  # the shipped ones


def check_settings(path: Path, settings: dict, message: str, write: bool = True) -> None:
    """
    Compares the settings of a run with those in `path`, which the run was started with, or writes them there.

    Args:
        settings (`dict`): Values that JSON cannot represent are compared as text.
        message (`str`): Text of the error, in which `{changes}` is replaced by the differences.
        write (`bool`): Whether this process writes new settings; of several processes only one may.

    Raises:
        `ValueError`: The settings differ, so that the result would be a mixture of both.
    """
    settings = json.loads(json.dumps(settings, default=str))
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if changed:
            changes = [f"{name} was {before.get(name)!r}, now {settings.get(name)!r}" for name in changed]
            raise ValueError(message.replace("{changes}", ", ".join(changes)))  # not `format`: paths may hold braces
    elif write:
        replace_json(path, settings)


class _SettingsLoader(yaml.SafeLoader):
    """PyYAML's loader, in which `1e-4` is a number, as in YAML 1.2, instead of a string."""


_SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$", re.ASCII), list("-+.0123456789")
)


def load_settings(text: str):
    """
    The value of a YAML text, such as a recipe or the part after `NAME=`.

    Raises:
        `yaml.YAMLError`: The text is not valid YAML.
    """
    return yaml.load(text, _SettingsLoader)
