"""The output of a mix: images referenced or copied, hashes and counts for the manifest, and what may be replaced."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from tqdm import tqdm

from safevlm.files import file_sha256
from safevlm.safety_labels import SafetyLabels

from .archives import ArchivedImage, split_archive_path
from .containers.folders import DiskFolder
from .errors import DataError
from .fingerprints import ImageIndex
from .images import ImageSource, image_file, load_image
from .mix_recipe import MixRecipe
from .safety_row import SafetyRow

MANIFEST = "manifest.json"
MANIFEST_FORMAT = "safevlm-mix/1"


class ImagePlacer:
    """Gives rows the image paths that they are written with.

    Args:
        images (`"reference"` or `"copy"`): Whether images stay where they are or are copied into `folder`.
        root (`Path`): The data root. Images that stay must be under it.
        folder (`Path`): The output folder.
        index (`ImageIndex`): The hashes of the images.

    Attributes:
        base (`Path`): The folder that written paths are relative to.
    """

    def __init__(
        self, images: Literal["reference", "copy"], root: Path, folder: Path, index: ImageIndex, progress: bool = True
    ) -> None:
        self.images, self.root, self.folder, self.index, self.progress = images, root, folder, index, progress
        self.base = folder if images == "copy" else root

    def place(self, rows: Sequence[SafetyRow]) -> tuple[list[SafetyRow], dict[str, str]]:
        """The rows as they are written, and the SHA-256 of each image file, by its path in the rows.

        Raises:
            `DataError`: An image to reference is not a file under the root, or one to copy changed since it was
                hashed.
        """
        placed, hashes = [], {}
        for row in tqdm(rows, "placing images", unit="row", disable=not self.progress, leave=False):
            paths = []
            for image in row.images:
                path, digest = self._copy(image) if self.images == "copy" else self._reference(image, row.row_id)
                paths.append(path)
                hashes[path.relative_to(self.base).as_posix()] = digest
            placed.append(replace(row, images=tuple(paths)))
        return placed, dict(sorted(hashes.items()))

    def _reference(self, image: ImageSource, row_id: str) -> tuple[Path, str]:
        if isinstance(image, (bytes, Image.Image, ArchivedImage)):
            raise DataError(f"row {row_id!r}: an image inside another file cannot be referenced; use `images: copy`.")
        path = Path(os.path.abspath(image))
        if not path.is_relative_to(self.root):
            raise DataError(
                f"row {row_id!r}: image {str(path)!r} is not under the data root {str(self.root)!r}; pass a root that "
                "holds all images, or use `images: copy`."
            )
        return path, self.index.fingerprint(image).file_sha256

    def _copy(self, image: ImageSource) -> tuple[Path, str]:
        """Copies an image once, named by the SHA-256 of its bytes; an image in memory becomes a PNG file."""
        content = image_file(image)
        if content is None:
            buffer = io.BytesIO()
            load_image(image).save(buffer, "PNG")
            content = buffer.getvalue()
        digest = hashlib.sha256(content).hexdigest()
        expected = self.index.fingerprint(image).file_sha256
        if expected not in (None, digest):
            raise DataError(f"image {os.fspath(image)!r} changed while the mix was made; run it again.")
        with Image.open(io.BytesIO(content)) as opened:
            suffix = "jpg" if opened.format == "JPEG" else opened.format.lower()
        path = self.folder / "images" / digest[:2] / f"{digest}.{suffix}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return path, digest


def check_output(output: Path, recipe: MixRecipe) -> None:
    """Refuses to replace anything but an earlier result of the same recipe."""
    if not output.exists():
        return
    try:
        manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
        earlier = manifest["recipe"] if manifest["format"] == MANIFEST_FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        earlier = None
    if not isinstance(earlier, dict):
        if output.is_dir() and not any(output.iterdir()):
            return
        raise ValueError(f"`output` {str(output)!r} exists and is not a mix; choose another folder.")
    now = recipe.to_dict()
    if changed := [name for name in now if now[name] != earlier.get(name)]:
        raise ValueError(
            f"`output` {str(output)!r} holds a mix of another recipe (`{changed[0]}` differs); choose another folder, "
            "or delete it."
        )


def count_labels(rows: Sequence[SafetyRow], labels: SafetyLabels) -> dict[str, Any]:
    """Numbers of rows by category and level, in the order of the labels, and by source."""
    categories, levels = Counter(row.category for row in rows), Counter(row.level for row in rows)
    return {
        "rows": len(rows),
        "categories": {name: categories[i] for i, name in enumerate(labels.category_names) if categories[i]},
        "levels": {name: levels[i] for i, name in enumerate(labels.level_names) if levels[i]},
        "sources": dict(Counter(row.source for row in rows)),
    }


def input_hashes(name: str, root: Path) -> dict[str, str | None]:
    """The SHA-256 of a data file, of the zip that holds it, or of all data files of a folder; `None` for a Hub id."""
    path = root / name
    if path.is_dir():
        files = DiskFolder(path).data_files()
        return {f"{name}/{file}": file_sha256(path / file) for file in files}
    if (in_archive := split_archive_path(path)) is not None:
        archive, member = in_archive
        return {name.removesuffix(f"/{member}"): file_sha256(archive)}
    return {name: file_sha256(path) if path.is_file() else None}


def mix_summary(manifest: dict[str, Any]) -> str:
    """What a mix read, left out and wrote, as text."""
    lines = []
    for name, source in manifest["sources"].items():
        left_out = ", ".join(f"{count} {reason}" for reason, count in source["left_out"].items())
        lines.append(
            f"{name}: {source['read']} read, {source['chosen']} chosen" + (f"; {left_out}" if left_out else "")
        )
    for split in manifest["splits"].values():
        categories = ", ".join(f"{count} {name}" for name, count in split["categories"].items())
        lines.append(f"{split['file']}: {split['rows']} rows, {len(split['images'])} images ({categories})")
    if manifest["test_rows_skipped"]:
        lines.append(f"test rows that cannot be read and were not compared with: {manifest['test_rows_skipped']}")
    return "\n".join(lines)
