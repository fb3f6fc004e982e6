"""Loads a run's labels from a file, a training recipe or a model. Needs neither torch nor transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from safevlm.files import is_hub_id
from safevlm.safety_labels import PAPER_LABELS, SafetyLabels
from safevlm.trainer.settings import RECIPES

from .errors import DataError, short

_NAMES = tuple(field.name for field in fields(SafetyLabels))


def load_labels(source: str | os.PathLike | Mapping[str, Any] | None, root: str | os.PathLike = "") -> SafetyLabels:
    """
    The labels that `source` holds. Names that it leaves out are the paper's.

    Args:
        source (`str`, `os.PathLike` or `Mapping`, *optional*): A YAML or JSON file with `category_names`,
            `level_names` and `safe_category`; a training recipe (a file or a shipped name), which has them under
            `safety:`; the folder, `config.json` or Hub id of a SafeVLM; or a mapping. `None` is the paper's labels.
        root (`str`, *optional*): The folder that files are relative to.

    Raises:
        `DataError`: There is no such file or model, or it has no valid labels.
    """
    if source is None:
        return PAPER_LABELS
    if isinstance(source, Mapping):
        return _labels(source, "`labels`")
    path = Path(root, source)
    name = f"`labels` {str(source)!r}"
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise DataError(f"{name}: the folder has no config.json; name a SafeVLM, a recipe or a YAML file.")
    elif not path.is_file():
        path = _shipped_or_on_hub(str(source), name)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{name} cannot be read ({error}).") from None
    if not isinstance(content, Mapping):
        raise DataError(f"{name} must hold some of {list(_NAMES)}, got {short(content)}.")
    return _labels(content, name)


def labels_dict(labels: SafetyLabels) -> dict[str, Any]:
    """The labels as they are written to JSON and YAML files, recipes and configurations."""
    return json.loads(json.dumps(asdict(labels)))


def _labels(content: Mapping[str, Any], where: str) -> SafetyLabels:
    if "model_type" in content and content["model_type"] != "safevlm":
        raise DataError(f"{where} is a model of type {content['model_type']!r}, not a SafeVLM: it has no labels.")
    if content.keys() & {"stages", "safety"}:
        content, where = content.get("safety") or {}, f"{where}, `safety`"
    elif unknown := [name for name in content if name not in _NAMES and "model_type" not in content]:
        raise DataError(f"{where} has the unknown entries {unknown}; known are {list(_NAMES)}.")
    try:
        return SafetyLabels(**{name: content[name] for name in _NAMES if name in content})
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None


def _shipped_or_on_hub(name: str, where: str) -> Path:
    """The file of a shipped recipe, or the configuration of a model on the Hub."""
    shipped = {path.stem: path for path in RECIPES.glob("*.yaml")}
    if name in shipped:
        return shipped[name]
    if is_hub_id(name):
        from safevlm.trainer.hub_config import hub_config

        try:
            return hub_config(name, "`labels`")
        except ValueError as error:
            raise DataError(str(error)) from None
    raise DataError(f"{where} is not a file, a model or one of the recipes {sorted(shipped)}; check the name.")
