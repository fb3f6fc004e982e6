"""A data set's own labels mapped to ours, as data: one YAML file per set, shipped in `taxonomies/` or a user's own.

The file says which field holds a set's label and which (category, level) each of its values stands for. A value that
the map lacks is never guessed: `Taxonomy.label` raises `UnmappedLabel`, and the reader lists all of them. README.md
in this folder documents the keys.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safevlm.safety_labels import PAPER_LABELS, SafetyLabels

from .errors import DataError, short
from .safety_row import label_ids

TAXONOMY_FOLDER = Path(__file__).parent / "taxonomies"
FIELD_NAMES = ("id", "image", "image_url", "question", "answer", "system")
TAXONOMY_KEYS = (
    *("name", "about", "source", "license", "format", "recognise", "fields", "prompt", "split", "metadata"),
    *("safe_when", "labels", "level", "question_dependent"),
)


class UnmappedLabel(DataError):
    """A label that a taxonomy does not know. `label` is `field = value`, the same for all rows that have it."""

    def __init__(self, label: str) -> None:
        super().__init__(f"the taxonomy has no entry for {label}")
        self.label = label


class Labels(NamedTuple):
    """What a taxonomy says of one row, as names; `None` is unknown."""

    category: str | None
    level: str | None
    question_dependent: bool | None


@dataclass(frozen=True)
class Map:
    """Values of one field and what they stand for. `field` is `None` for a constant, which is `missing` then."""

    field: str | None
    values: dict[str, Any]
    missing: Any
    has_missing: bool

    def __call__(self, facts: dict[str, Any]) -> Any:
        if self.field is None:
            return self.missing
        value = facts.get(self.field)
        if value is None or value == "":
            if not self.has_missing:
                raise UnmappedLabel(f"{self.field} missing")
            return self.missing
        key = _key(value)
        if key not in self.values:
            raise UnmappedLabel(f"{self.field} = {short(value)}")
        return self.values[key]


@dataclass(frozen=True)
class Taxonomy:
    """One YAML file, checked. Made by `Taxonomy.load`.

    Args:
        name (`str`): The set's name, the rows' `source`.
        format (`str`): The record format; `"flat"` where `fields` says it all.
        fields (`dict[str, str]`): For flat sets: which field is the `id`, `image`, `question`, `answer`, `system`; or
            the `image_url`, which is not fetched: its last part names the image in the image folder.
        recognise (`tuple[frozenset[str], ...]`): A record with all fields of one of these is of this set.
        prompt (`str`): The question of sets that have none. Empty for none.
        split (`str`): The split of all rows. Empty where the file or the Hub says it.
        safe_when (`dict[str, frozenset[str]]`): Rows with one of these values are safe, of the first level.
        metadata (`frozenset[str]`): Fields that are neither picture, turn nor label, whatever their names say.
        our_labels (`SafetyLabels`): What the set's labels are mapped to.
        labels, level, question_dependent (`Map`): See README.md.
    """

    name: str
    format: str = "flat"
    fields: dict[str, str] = field(default_factory=dict)
    recognise: tuple[frozenset[str], ...] = ()
    prompt: str = ""
    split: str = ""
    safe_when: dict[str, frozenset[str]] = field(default_factory=dict)
    metadata: frozenset[str] = frozenset()
    our_labels: SafetyLabels = PAPER_LABELS
    labels: Map | None = None
    level: Map | None = None
    question_dependent: Map | None = None

    @staticmethod
    def load(name_or_path: str | os.PathLike, labels: SafetyLabels = PAPER_LABELS) -> Taxonomy:
        """Reads a shipped taxonomy by name, or a YAML file.

        Args:
            labels (`SafetyLabels`, *optional*): What it may map to.

        Raises:
            `DataError`: No such name or file, bad YAML, an unknown key or an unknown label of ours.
        """
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            if str(name_or_path) not in shipped_taxonomies():
                known = list(shipped_taxonomies())
                raise DataError(f"`taxonomy` must be a YAML file or one of {known}, got {str(name_or_path)!r}.")
            path = TAXONOMY_FOLDER / f"{name_or_path}.yaml"
        return _load(path, labels)

    def label(self, facts: dict[str, Any]) -> Labels:
        """The labels of a row.

        Args:
            facts (`dict`): The record's fields, and `$file`, `$folder`, `$split`, `$subset` and what its format adds.

        Raises:
            `UnmappedLabel`: A value is not in the map.
        """
        dependent = self.question_dependent(facts) if self.question_dependent else None
        for name, values in self.safe_when.items():
            if facts.get(name) is not None and _key(facts[name]) in values:
                return Labels(self.our_labels.safe_category, self.our_labels.level_names[0], dependent)
        category, level = self.labels(facts) if self.labels else (None, None)
        if self.level is not None:
            level = self.level(facts)
        return Labels(category, level, dependent)

    @property
    def label_fields(self) -> frozenset[str]:
        """The fields that it reads labels from."""
        maps = (self.labels, self.level, self.question_dependent)
        return frozenset(self.safe_when) | {one.field for one in maps if one is not None and one.field is not None}


@functools.cache
def shipped_taxonomies() -> tuple[str, ...]:
    """The names of the taxonomies in this package."""
    return tuple(sorted(path.stem for path in TAXONOMY_FOLDER.glob("*.yaml")))


def _key(value: Any) -> str:
    """Labels are compared as text, ignoring case and outer blanks: published copies of a set differ in these."""
    return " ".join(str(value).split()).casefold()


@functools.lru_cache(maxsize=64)
def _shipped(path: Path, labels: SafetyLabels) -> Taxonomy:
    return _parse(path, labels)


def _load(path: Path, labels: SafetyLabels) -> Taxonomy:
    read = _shipped if path.parent == TAXONOMY_FOLDER else _parse  # a user edits their file between two calls
    return read(path, labels)


def _parse(path: Path, labels: SafetyLabels) -> Taxonomy:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"`taxonomy` {str(path)!r} cannot be read ({error}).") from None
    try:
        return _from_dict(content, labels)
    except DataError as error:
        raise DataError(f"`taxonomy` {str(path)!r}: {error}.") from None


def _from_dict(content: Any, labels: SafetyLabels) -> Taxonomy:
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        raise DataError("it must be a mapping with at least a `name`")
    if unknown := [key for key in content if key not in TAXONOMY_KEYS]:
        raise DataError(f"unknown keys {unknown}; known are {list(TAXONOMY_KEYS)}")
    for key in ("format", "prompt", "split"):
        if not isinstance(content.get(key, ""), str):
            raise DataError(f"`{key}` must be a text, got {short(content[key])}")
    fields = content.get("fields") or {}
    if not isinstance(fields, dict) or not all(
        key in FIELD_NAMES and isinstance(value, str) for key, value in fields.items()
    ):
        raise DataError(f"`fields` must map some of {list(FIELD_NAMES)} to field names, got {short(fields)}")
    if content.get("format", "flat") == "flat" and not ("question" in fields or content.get("prompt")):
        raise DataError("a flat set needs `fields: {question: ...}`, or a `prompt` to ask about each image")
    if {"image", "image_url"} <= fields.keys():
        raise DataError("`fields` has `image` and `image_url`; keep one of them")

    def label_pair(value: Any) -> tuple[str | None, str | None]:
        category, level = value if isinstance(value, list) and len(value) == 2 else (value, None)
        if category == labels.safe_category and level is None:
            level = labels.level_names[0]
        check_names(category, level)
        if level is None and category is not None and "level" not in content:
            raise DataError(f"{short(value)} has no level; write [category, level] or add `level`")
        return category, level

    def check_names(category: Any, level: Any) -> None:
        if category is not None and category not in labels.category_names:
            raise DataError(f"{short(category)} is none of our categories {list(labels.category_names)}")
        if level is not None and level not in labels.level_names:
            raise DataError(f"{short(level)} is none of our levels {list(labels.level_names)}")
        if category is not None and level is not None:
            label_ids(category, level, labels)

    def level_name(value: Any) -> str | None:
        check_names(None, value)
        return value

    def dependence(value: Any) -> bool | None:
        if value is not None and not isinstance(value, bool):
            raise DataError(f"`question_dependent` must be true, false or null, got {short(value)}")
        return value

    return Taxonomy(
        name=content["name"],
        format=content.get("format", "flat"),
        fields=fields,
        recognise=_recognise(content.get("recognise") or []),
        prompt=content.get("prompt", ""),
        split=content.get("split", ""),
        safe_when=_safe_when(content.get("safe_when") or {}),
        metadata=_metadata(content.get("metadata") or []),
        our_labels=labels,
        labels=_map(content, "labels", label_pair),
        level=_map(content, "level", level_name),
        question_dependent=_map(content, "question_dependent", dependence),
    )


def _map(content: dict, name: str, parse) -> Map | None:
    """A `Map` from `{field, values, missing}`, or from a constant."""
    if name not in content:
        return None
    value = content[name]
    if not isinstance(value, dict):
        return Map(None, {}, parse(value), True)
    values = value.get("values")
    if not isinstance(value.get("field"), str) or not isinstance(values, dict) or value.keys() - _MAP_KEYS:
        raise DataError(f"`{name}` must be a constant, or have `field`, `values` and perhaps `missing`")
    parsed = {_key(_yaml_text(key)): parse(entry) for key, entry in values.items()}
    if len(parsed) < len(values):
        raise DataError(f"`{name}` has labels that differ only in case or blanks")
    has_missing = "missing" in value
    return Map(value["field"], parsed, parse(value["missing"]) if has_missing else None, has_missing)


_MAP_KEYS = {"field", "values", "missing"}


def _safe_when(content: Any) -> dict[str, frozenset[str]]:
    if not isinstance(content, dict) or not all(isinstance(values, list) for values in content.values()):
        raise DataError(f"`safe_when` must map fields to lists of values, got {short(content)}")
    return {name: frozenset(_key(_yaml_text(value)) for value in values) for name, values in content.items()}


def _metadata(content: Any) -> frozenset[str]:
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise DataError(f"`metadata` must be a list of field names, got {short(content)}")
    return frozenset(content)


def _recognise(content: Any) -> tuple[frozenset[str], ...]:
    if not isinstance(content, list) or not all(isinstance(names, list) and names for names in content):
        raise DataError(f"`recognise` must be a list of lists of field names, got {short(content)}")
    return tuple(map(frozenset, content))


def _yaml_text(value: Any) -> str:
    """YAML reads yes, no, true and false as booleans, JSON data hold the last two as such."""
    if not isinstance(value, (str, int, float, bool)):
        raise DataError(f"a label must be a text, a number or true/false, got {short(value)}")
    return str(value)
