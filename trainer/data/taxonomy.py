"""Maps a data set's own labels to our categories and levels, as stated by a YAML file: in `taxonomies/`, or a user's.

The file says which field holds a label and which (category, level) each of its values means. A value that the map
lacks is never guessed: `Taxonomy.label` raises `UnmappedLabel`, and the reader lists all such values. README.md in
this folder documents the keys.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
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
    """A taxonomy lacks a label. `label` is `field = value`, the same for all rows that have it."""

    def __init__(self, label: str) -> None:
        super().__init__(f"the taxonomy has no entry for {label}")
        self.label = label


class RowLabels(NamedTuple):
    """The names of the labels that a taxonomy gives a row; `None` is unknown."""

    category: str | None
    level: str | None
    question_dependent: bool | None


@dataclass(frozen=True)
class LabelMap:
    """
    What the values of a field mean.

    Args:
        field (`str`, *optional*): The field; `None` for a constant, which is then `missing`.
        values (`dict`): The meaning of each value, by `_key`.
        missing: The meaning of an absent or empty field.
        has_missing (`bool`): Whether the field may be absent or empty.
    """

    field: str | None
    values: dict[str, Any]
    missing: Any
    has_missing: bool

    def __call__(self, facts: dict[str, Any]) -> Any:
        """The meaning of the field's value in `facts`; raises `UnmappedLabel` if the map lacks it."""
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
    """A checked YAML file. Made by `Taxonomy.load`.

    Args:
        name (`str`): The name of the data set, which becomes the rows' `source`.
        format (`str`): The record format; `"flat"` if `fields` describes the records completely.
        fields (`dict[str, str]`): For flat sets, the fields that hold `id`, `image`, `question`, `answer` and
            `system`. Instead of `image` there may be `image_url`, which is not fetched: its last part is the name of
            the image in the image folder.
        recognise (`tuple[frozenset[str], ...]`): A record with all fields of one of these belongs to this data set.
        prompt (`str`): The question of data sets that have none, or empty.
        split (`str`): The split of all rows; empty if the file or the Hub states it.
        safe_when (`dict[str, frozenset[str]]`): Rows with one of these values are safe, with the first level.
        metadata (`frozenset[str]`): Fields that are not a picture, turn or label, whatever their names suggest.
        our_labels (`SafetyLabels`): What the labels are mapped to.
        labels, level, question_dependent (`LabelMap`): See README.md.
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
    labels: LabelMap | None = None
    level: LabelMap | None = None
    question_dependent: LabelMap | None = None

    @staticmethod
    def load(name_or_path: str | os.PathLike, labels: SafetyLabels = PAPER_LABELS) -> Taxonomy:
        """Reads a shipped taxonomy by name, or a YAML file.

        Args:
            labels (`SafetyLabels`, *optional*): The labels that it may map to.

        Raises:
            `DataError`: There is no such name or file; the YAML is bad, has an unknown key, or maps to a label that
                `labels` lacks.
        """
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            if str(name_or_path) not in shipped_taxonomies():
                known = list(shipped_taxonomies())
                raise DataError(f"`taxonomy` must be a YAML file or one of {known}, got {str(name_or_path)!r}.")
            path = TAXONOMY_FOLDER / f"{name_or_path}.yaml"
        return _load(path, labels)

    def label(self, facts: dict[str, Any]) -> RowLabels:
        """The labels of a row.

        Args:
            facts (`dict`): The record's fields, `$file`, `$folder`, `$split`, `$subset`, and what the format adds.

        Raises:
            `UnmappedLabel`: A map lacks a value.
        """
        dependent = self.question_dependent(facts) if self.question_dependent else None
        for name, values in self.safe_when.items():
            if facts.get(name) is not None and _key(facts[name]) in values:
                return RowLabels(self.our_labels.safe_category, self.our_labels.level_names[0], dependent)
        category, level = self.labels(facts) if self.labels else (None, None)
        if self.level is not None:
            level = self.level(facts)
        return RowLabels(category, level, dependent)

    def recognises(self, record: dict[str, Any]) -> bool:
        """Whether a record is of this data set, by its fields."""
        return any(names <= record.keys() for names in self.recognise)

    @property
    def label_fields(self) -> frozenset[str]:
        """The fields that the labels come from."""
        maps = (self.labels, self.level, self.question_dependent)
        fields = {label_map.field for label_map in maps if label_map is not None}
        return frozenset(self.safe_when) | (fields - {None})


@functools.cache
def shipped_taxonomies() -> tuple[str, ...]:
    """The names of the taxonomies in this package."""
    return tuple(sorted(path.stem for path in TAXONOMY_FOLDER.glob("*.yaml")))


def _key(value: Any) -> str:
    """What labels are compared by: text without case and extra blanks, in which published copies of a set differ."""
    return " ".join(str(value).split()).casefold()


def _load(path: Path, labels: SafetyLabels) -> Taxonomy:
    # Users may edit their files between two calls; shipped files do not change.
    load = _load_shipped if path.parent == TAXONOMY_FOLDER else _load_file
    return load(path, labels)


def _load_file(path: Path, labels: SafetyLabels) -> Taxonomy:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"`taxonomy` {str(path)!r} cannot be read ({error}).") from None
    try:
        return _from_content(content, labels)
    except DataError as error:
        raise DataError(f"`taxonomy` {str(path)!r}: {error}.") from None


_load_shipped = functools.lru_cache(maxsize=64)(_load_file)


def _from_content(content: Any, labels: SafetyLabels) -> Taxonomy:
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        raise DataError("it must be a mapping with at least a `name`")
    if unknown := [key for key in content if key not in TAXONOMY_KEYS]:
        raise DataError(f"unknown keys {unknown}; known are {list(TAXONOMY_KEYS)}")
    for key in ("format", "prompt", "split"):
        if not isinstance(content.get(key, ""), str):
            raise DataError(f"`{key}` must be a text, got {short(content[key])}")
    parser = _LabelParser(labels, has_level="level" in content)
    return Taxonomy(
        name=content["name"],
        format=content.get("format", "flat"),
        fields=_fields(content),
        recognise=_recognise(content.get("recognise") or []),
        prompt=content.get("prompt", ""),
        split=content.get("split", ""),
        safe_when=_safe_when(content.get("safe_when") or {}),
        metadata=_metadata(content.get("metadata") or []),
        our_labels=labels,
        labels=_map(content, "labels", parser.pair),
        level=_map(content, "level", parser.level),
        question_dependent=_map(content, "question_dependent", parser.question_dependent),
    )


class _LabelParser:
    """Checks what the values of a data set mean. `has_level`: whether the file maps levels on their own."""

    def __init__(self, labels: SafetyLabels, has_level: bool) -> None:
        self.labels, self.has_level = labels, has_level

    def pair(self, value: Any) -> tuple[str | None, str | None]:
        """Category and level, from such a pair or from a category alone."""
        category, level = value if isinstance(value, list) and len(value) == 2 else (value, None)
        if category == self.labels.safe_category and level is None:
            level = self.labels.level_names[0]
        if category is not None and category not in self.labels.category_names:
            raise DataError(f"{short(category)} is none of our categories {list(self.labels.category_names)}")
        self.level(level)
        if category is not None and level is not None:
            label_ids(category, level, self.labels)
        if level is None and category is not None and not self.has_level:
            raise DataError(f"{short(value)} has no level; write [category, level] or add `level`")
        return category, level

    def level(self, value: Any) -> str | None:
        if value is not None and value not in self.labels.level_names:
            raise DataError(f"{short(value)} is none of our levels {list(self.labels.level_names)}")
        return value

    @staticmethod
    def question_dependent(value: Any) -> bool | None:
        if value is not None and not isinstance(value, bool):
            raise DataError(f"`question_dependent` must be true, false or null, got {short(value)}")
        return value


def _fields(content: dict) -> dict[str, str]:
    fields = content.get("fields") or {}
    if not isinstance(fields, dict) or not all(
        key in FIELD_NAMES and isinstance(value, str) for key, value in fields.items()
    ):
        raise DataError(f"`fields` must map some of {list(FIELD_NAMES)} to field names, got {short(fields)}")
    if content.get("format", "flat") == "flat" and not ("question" in fields or content.get("prompt")):
        raise DataError("a flat set needs `fields: {question: ...}`, or a `prompt` to ask about each image")
    if {"image", "image_url"} <= fields.keys():
        raise DataError("`fields` has `image` and `image_url`; keep one of them")
    return fields


def _map(content: dict, name: str, parse: Callable[[Any], Any]) -> LabelMap | None:
    """A `LabelMap` from `{field, values, missing}`, or from a constant."""
    if name not in content:
        return None
    value = content[name]
    if not isinstance(value, dict):
        return LabelMap(None, {}, parse(value), True)
    values = value.get("values")
    known = {"field", "values", "missing"}
    if not isinstance(value.get("field"), str) or not isinstance(values, dict) or value.keys() - known:
        raise DataError(f"`{name}` must be a constant, or have `field`, `values` and perhaps `missing`")
    parsed = {_key(_yaml_text(key)): parse(entry) for key, entry in values.items()}
    if len(parsed) < len(values):
        raise DataError(f"`{name}` has labels that differ only in case or blanks")
    has_missing = "missing" in value
    return LabelMap(value["field"], parsed, parse(value["missing"]) if has_missing else None, has_missing)


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
    """A value of the file as text. YAML reads yes, no, true and false as booleans; JSON data has the last two."""
    if not isinstance(value, (str, int, float, bool)):
        raise DataError(f"a label must be a text, a number or true/false, got {short(value)}")
    return str(value)
