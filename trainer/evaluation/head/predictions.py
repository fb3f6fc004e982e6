"""What the safety head says about labelled rows, as records in a JSONL file.

The model runs once, in [`predict_rows`]; measures, plots and calibration under any policy are computed from the
records alone. As at inference, a row is read once for each of its images and each reading of its turns (`prompt.py`).
A record holds what the head says in each of these readings, and [`assess_rows`] makes one verdict of them, as in
`assess` and `generate`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from safevlm.files import replace_text
from safevlm.trainer.data import DataError


@dataclass(frozen=True)
class HeadPrediction:
    """
    The safety head's raw output on one row, beside the row's labels.

    Args:
        row_id, source (`str`): The row's. Ids need not be unique.
        level, category (`int`, *optional*): The labels' ids; `None` if unknown.
        level_logits (`tuple` of `num_readings` tuples of `num_levels` floats): Before any temperature. Empty for a
            row that is not assessed.
        category_logits (`tuple` of `num_readings` tuples of `num_categories` floats): Likewise.
        whole_conversation (`tuple[bool, ...]` of length `num_readings`): Whether the reading covers several turns.
            Such a reading counts only under policies whose `whole_conversation` is true.
        images (`tuple[str, ...]`): Hashes of the images' contents. Rows that share an image are not independent.
        fingerprint (`str`): Hash of the row and the safety modules. If it is equal, predicting again gives the same.
    """

    row_id: str
    source: str
    level: int | None
    category: int | None
    level_logits: tuple[tuple[float, ...], ...]
    category_logits: tuple[tuple[float, ...], ...]
    whole_conversation: tuple[bool, ...]
    images: tuple[str, ...]
    fingerprint: str

    @property
    def assessed(self) -> bool:
        """`False` for a row without an image."""
        return bool(self.level_logits)


def write_predictions(predictions: Sequence[HeadPrediction], path: str | os.PathLike) -> None:
    """Writes one JSON object per line, to a file that is replaced only when complete."""
    lines = (json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in predictions)
    replace_text(Path(path), "".join(lines))


def read_predictions(path: str | os.PathLike) -> list[HeadPrediction]:
    """Reads what [`write_predictions`] wrote. Raises `DataError` naming the first line that is not a prediction."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [parse_prediction(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]


def parse_prediction(line: str, where: str) -> HeadPrediction:
    """One line of a predictions file; `where` names it in errors."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not valid JSON ({error}); delete the file to predict again.") from None
    names = {field.name for field in fields(HeadPrediction)}
    if not isinstance(record, dict) or record.keys() != names:
        raise DataError(
            f"{where} is not a prediction of this version, whose fields are {', '.join(sorted(names))}; delete the "
            f"file to predict again."
        )
    for name in ("level_logits", "category_logits"):
        record[name] = tuple(map(tuple, record[name]))
    for name in ("whole_conversation", "images"):
        record[name] = tuple(record[name])
    return HeadPrediction(**record)
