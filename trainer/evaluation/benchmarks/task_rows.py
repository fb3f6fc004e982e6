"""The rows of our tasks, from the local copies under the data folder. `evaluation/README.md` shows the layout."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safevlm.safety_labels import PAPER_LABELS, SafetyLabels
from safevlm.trainer.data import DataError, SafetyRow, load_labels, read_rows

from .task_names import HOW_TO_GET, task_files

LABELS_VARIABLE = "SAFEVLM_EVAL_LABELS"
"""Environment variable: a SafeVLM, recipe or YAML file whose labels a user's own rows have. Default: the paper's."""


def task_rows(
    data: Path,
    task: str,
    path: str,
    images: str | None = None,
    format: str | None = None,
    labels: SafetyLabels = PAPER_LABELS,
) -> list[SafetyRow]:
    """
    Reads a task's rows. A bad row raises, since a benchmark with rows left out is a different benchmark.

    Args:
        data (`Path`): The data folder.
        path (`str`): Data file or folder under it, or a glob whose matches are read in order of their names.
        images (`str`, *optional*): Image folder, relative to the data file's folder; by default that folder itself.
        format (`str`, *optional*): See [`read_rows`]; `"mossbench"` is read here. By default it is detected.
        labels (`SafetyLabels`, *optional*): What the rows' labels mean.
    """
    rows = []
    for file in task_files(data, task, path):
        folder = None if images is None else file.parent / images
        if format == "mossbench":
            rows += mossbench_rows(file, folder or file.parent)
        else:
            rows += read_rows(file, folder, format=format, labels=labels, require_answer=False, check_images="header")
    return rows


def task_labels(metadata: dict) -> SafetyLabels:
    """What the labels of a task's rows mean: the paper's labels, which public sets are mapped to, or the model's."""
    return load_labels(os.environ.get(LABELS_VARIABLE)) if metadata.get("own_labels") else PAPER_LABELS


def mossbench_rows(path: Path, image_folder: Path) -> list[SafetyRow]:
    """
    MOSSBench's `information.json` (arXiv 2406.17806): `{pid: {image, question, metadata: {over, ...}}}`.

    Every request is harmless but looks harmful; the three kinds of look-alike (`over`) become the rows' `source`.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: invalid JSON ({error}).") from None
    if not isinstance(records, dict):
        raise DataError(
            f"{path}: MOSSBench's file is a JSON object of records by number, got {type(records).__name__}."
        )
    rows = []
    for pid, record in records.items():
        try:
            name, question, over = record["image"], record["question"], record["metadata"]["over"]
        except (KeyError, TypeError):
            raise DataError(f"{path}, record {pid!r}: needs the fields image, question and metadata.over.") from None
        image = Path(os.path.normpath(image_folder.resolve() / str(name)))
        if not image.is_relative_to(os.path.normpath(image_folder.resolve())):
            raise DataError(f"{path}, record {pid!r}: `image` {name!r} leaves the folder {image_folder}.")
        if not image.is_file():
            raise DataError(f"{path}, record {pid!r}: no image {image}; {HOW_TO_GET}.")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        rows.append(
            SafetyRow(
                row_id=f"mossbench-{pid}",
                images=(image,),
                messages=[{"role": "user", "content": content}],
                category=PAPER_LABELS.safe_category_id,
                level=0,
                source=f"mossbench {over}",
                split="test",
            )
        )
    return rows
