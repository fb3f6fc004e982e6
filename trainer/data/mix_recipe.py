"""A mix recipe: a YAML file that states completely which rows of which data sets make up a training set.

```yaml
seed: 0
sources:                       # paths are relative to the data root
  - {name: vlguard, path: vlguard/train.json, images: vlguard/train}
  - {name: clean, path: llava/instruct.json, images: coco, assume_safe: true, max_rows: 3000}
against: [{path: vlguard/test.json, images: vlguard/test}]
balance: true
clean_ratio: 0.27
```
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from safevlm.files import is_hub_id

from .fingerprints import HASH_BITS, NEAR_DISTANCE
from .readers import Rows, read_rows

MIXES = Path(__file__).parent / "mixes"


@dataclass(frozen=True)
class MixFile:
    """A data file: a source of rows, or a test set.

    Args:
        path (`str`): The file, folder or zip, relative to the data root, or a Hub id.
        images (`str`, *optional*): Its image folder or zip, relative to the data root. Defaults to the file's folder.
        taxonomy (`str`, *optional*): A shipped taxonomy, or a YAML file relative to the data root.
        format, split, subset, revision (`str`, *optional*): As in `ReadOptions`. Pin `revision` of a Hub
            data set to a commit, or the mix is not reproducible.
    """

    path: str
    images: str | None = None
    format: str | None = None
    taxonomy: str | None = None
    split: str | None = None
    subset: str | None = None
    revision: str | None = None

    def read(self, root: Path, **options: Any) -> Rows:
        """Reads its rows; `options` are further ones of `ReadOptions`."""
        in_root = root / self.path
        on_hub = is_hub_id(self.path) and not in_root.exists()
        taxonomy = self.taxonomy
        if taxonomy is not None and taxonomy.endswith((".yaml", ".yml")):
            taxonomy = root / taxonomy
        return read_rows(
            self.path if on_hub else in_root,
            None if self.images is None else root / self.images,
            format=self.format,
            taxonomy=taxonomy,
            split=self.split,
            subset=self.subset,
            revision=self.revision,
            **options,
        )


@dataclass(frozen=True)
class MixSource(MixFile):
    """A data file to draw rows from.

    Args:
        name (`str`): The rows' `source` and the prefix of their ids. Each source needs its own.
        assume_safe (`bool`, *optional*, defaults to `False`): Whether rows of a format without labels count as safe.
            Otherwise they are dropped, because the output needs both labels.
        max_rows (`int`, *optional*): Largest number of rows to take. They are drawn by seed before any image is
            opened, so a few thousand rows of a large data set are cheap. Rows dropped later are not replaced.
    """

    name: str = ""
    assume_safe: bool = False
    max_rows: int | None = None


@dataclass(frozen=True)
class MixRecipe:
    """A recipe. The steps run in the order of the arguments; the manifest counts what each of them leaves out.

    Args:
        sources (`tuple[MixSource]`): Data files to draw from.
        against (`tuple[MixFile]`, *optional*): Test sets. A row that shares an image with one of them, exactly or
            nearly, is dropped; so is a row without image that shares a question.
        duplicates (`"near"`, `"exact"` or `"keep"`, *optional*, defaults to `"near"`): Which images count as the
            same when rows that repeat image, question and labels of an earlier row are dropped. `"keep"` drops none.
        near_distance (`int`, *optional*, defaults to 24): Bits, of 256, in which the perceptual hashes of near
            duplicates may differ.
        max_per_category (`int`, *optional*): Largest number of rows of each risk category, drawn by seed.
        balance (`bool`, *optional*, defaults to `True`): Whether all risk categories contribute as many rows as the
            smallest one.
        clean_ratio (`float`, *optional*): Number of clean rows per risky row. `None` takes all of them.
        holdout (`float` in [0, 1), *optional*, defaults to 0): Share of the rows to hold out, by image.
        seed (`int`, *optional*, defaults to 0): Decides which rows are drawn.
        images (`"reference"` or `"copy"`, *optional*, defaults to `"reference"`): Whether rows refer to the images in
            place, under the data root, or to copies in the output, named by their SHA-256.
        labels (`dict` or `str`, *optional*): `category_names`, `level_names` and `safe_category`, or where to load
            them from, relative to the data root: see `load_labels`. Defaults to the paper's.
    """

    sources: tuple[MixSource, ...]
    against: tuple[MixFile, ...] = ()
    duplicates: Literal["near", "exact", "keep"] = "near"
    near_distance: int = NEAR_DISTANCE
    max_per_category: int | None = None
    balance: bool = True
    clean_ratio: float | None = None
    holdout: float = 0.0
    seed: int = 0
    images: Literal["reference", "copy"] = "reference"
    labels: dict | str | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("`sources` must list at least one data file, got none.")
        for number, source in enumerate(self.sources, start=1):
            if not source.name or "/" in source.name:
                raise ValueError(f"`name` of source {number} must be a text without '/', got {source.name!r}.")
            _at_least(f"`max_rows` of source {source.name!r}", source.max_rows, 1)
        names = [source.name for source in self.sources]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"`name` must differ between sources, {repeated[0]!r} is used twice.")
        for name, allowed in (("duplicates", ("near", "exact", "keep")), ("images", ("reference", "copy"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        _at_least("`max_per_category`", self.max_per_category, 1)
        _at_least("`clean_ratio`", self.clean_ratio, 0)
        if not 0 <= self.near_distance < HASH_BITS:
            raise ValueError(f"`near_distance` must be in 0..{HASH_BITS - 1}, got {self.near_distance!r}.")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"`holdout` must be in [0, 1), got {self.holdout!r}.")

    @classmethod
    def load(cls, name: str | os.PathLike) -> MixRecipe:
        """Loads a shipped recipe by name, or a YAML file.

        Raises:
            `ValueError`: There is no such recipe, or an entry is unknown, missing, of the wrong type or out of range.
        """
        path = cls.find(name)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"mix recipe {path} is not valid YAML: {error}") from None
        try:
            content = _checked(content, cls, "the recipe")
            for key, kind in (("sources", MixSource), ("against", MixFile)):
                if key in content:
                    files = enumerate(content[key], start=1)
                    content[key] = tuple(kind(**_checked(file, kind, f"`{key}` {number}")) for number, file in files)
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"mix recipe {path}: {error}") from None

    @staticmethod
    def find(name: str | os.PathLike) -> Path:
        """The file of a recipe, shipped or not."""
        path = Path(name) if str(name).endswith((".yaml", ".yml")) else MIXES / f"{name}.yaml"
        if not path.is_file():
            shipped = ", ".join(sorted(recipe.stem for recipe in MIXES.glob("*.yaml")))
            raise ValueError(f"mix recipe {str(name)!r} not found; use a .yaml file or one of: {shipped}.")
        return path

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON would give it back."""
        return {
            **asdict(self),
            "sources": [asdict(source) for source in self.sources],
            "against": [asdict(file) for file in self.against],
        }


_TYPES = {
    "bool": (bool, "true or false"),
    "int": (int, "an integer"),
    "float": ((int, float), "a number"),
    "str": (str, "a text"),
    "dict": ((dict, str), "a mapping or a text"),
    "tuple": (list, "a list"),
    "Literal": (str, "a text"),
}


def _checked(content: Any, kind: type, where: str) -> dict[str, Any]:
    """Returns `content` if its entries are fields of the dataclass `kind`, with values of their types."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a mapping of names to values, got {content!r}.")
    known = {entry.name: entry for entry in fields(kind)}
    if unknown := sorted(str(key) for key in content if key not in known):
        raise ValueError(f"{where} has the unknown entry `{unknown[0]}`; known are {', '.join(known)}.")
    if missing := [name for name, entry in known.items() if entry.default is MISSING and name not in content]:
        raise ValueError(f"{where} lacks `{missing[0]}`.")
    for name, value in content.items():
        annotation = str(known[name].type)
        types, wanted = _TYPES[annotation.split("[")[0].split(" |")[0]]
        if value is None and annotation.endswith("| None"):
            continue
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise ValueError(f"`{name}` of {where} must be {wanted}, got {value!r}.")
    return dict(content)


def _at_least(what: str, value: float | None, smallest: float) -> None:
    if value is not None and not smallest <= value < math.inf:
        raise ValueError(f"{what} must be at least {smallest} and finite, got {value!r}.")
