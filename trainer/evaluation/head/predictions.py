"""What the safety head says about labelled rows, as records in a JSONL file.

The model runs once, in [`predict_rows`]; measures, plots and calibration are computed from the records alone, for any
policy. The prompt is the one of inference: the row's turns up to the question last asked, without its answer. As at
inference, too, a row is read as often as it has images and readings of its turns (see prompt.py): a record
holds what the head says each time, and [`assess_rows`] makes one verdict of that, as in `assess` and `generate`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from safevlm.files import replace_text
from safevlm.safety_adapter import whole_state_dict
from safevlm.trainer.data import DataError, SafetyRow
from safevlm.trainer.data.fingerprints import image_file
from safevlm.trainer.data.sampling import image_key


@dataclass(frozen=True)
class HeadPrediction:
    """
    The safety head's raw output on one row, beside the row's labels.

    Args:
        row_id, source (`str`): The row's. Ids need not be unique.
        level, category (`int`, *optional*): The labels' ids, `None` where unknown.
        level_logits (`tuple` of `num_readings` tuples of `num_levels` floats), category_logits (likewise): Of each
            image in each reading of the turns, before any temperature. None for a row that is not assessed.
        whole_conversation (`tuple[bool, ...]` of length `num_readings`): Whether the reading is of several turns. It
            counts only where the policy's `whole_conversation` is true.
        images (`tuple[str, ...]`): Hashes of the images' content. Rows with a common one are not independent.
        fingerprint (`str`): Of row and safety modules: equal only if predicting again would give the same.
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
    """Writes one JSON object per line; replaces `path` only when complete."""
    replace_text(Path(path), "".join(map(_line, predictions)))


def read_predictions(path: str | os.PathLike) -> list[HeadPrediction]:
    """Reads what [`write_predictions`] wrote. Raises `DataError` with the number of a line that is no prediction."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]


def predict_rows(
    model,
    processor,
    rows: Sequence[SafetyRow],
    batch_size: int = 16,
    device: str | None = None,
    path: str | os.PathLike | None = None,
) -> list[HeadPrediction]:
    """
    Runs vision tower and safety head, not the language model, on every row.

    Args:
        model (`SafeVlmForConditionalGeneration`), processor (`SafeVlmProcessor`)
        rows (`Sequence[SafetyRow]`): With or without labels and answers.
        device (`str`, *optional*): The model is moved there first; by default it stays where it is.
        path (`str` or `os.PathLike`, *optional*): JSONL file to write. Predictions already in it, or in the
            `.partial` file of an interrupted run, are used where row and safety modules are unchanged.

    Returns:
        `list[HeadPrediction]` in the order of `rows`.

    Raises:
        `ImageError`: An image cannot be loaded.
        `ValueError`: The head's logits are not finite.
    """
    from tqdm.auto import tqdm

    if batch_size < 1:
        raise ValueError(f"`batch_size` must be 1 or more, got {batch_size}.")
    if device is not None:
        model.to(device)
    images = _image_hashes(rows)
    weights = _weights_hash(model.safety)
    fingerprints = [_fingerprint(row, hashes, weights) for row, hashes in zip(rows, images, strict=True)]
    partial = None if path is None else Path(path).with_name(Path(path).name + ".partial")
    known = {} if path is None else {**_whole_lines(Path(path)), **_whole_lines(partial)}
    todo = {fingerprints[i]: i for i in range(len(rows)) if fingerprints[i] not in known}

    def record(i: int, **output) -> HeadPrediction:
        row, labels = rows[i], {"level": rows[i].level, "category": rows[i].category}
        return HeadPrediction(
            row.row_id, row.source, **labels, **output, images=images[i], fingerprint=fingerprints[i]
        )

    for fingerprint, i in todo.items():
        if not images[i]:
            known[fingerprint] = record(i, level_logits=(), category_logits=(), whole_conversation=())
    # Rows of a kind together, so that little is padded; the largest first, so that a batch that fits at the start
    # fits to the end.
    order = [i for i in todo.values() if images[i]]
    order.sort(key=lambda i: (len(images[i]), _text_length(rows[i])), reverse=True)
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(rows), initial=len(rows) - len(order), desc="assess", unit="row") as progress:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                outputs = _predict_batch(model, processor, [rows[i] for i in batch])
                new = [record(i, **output) for i, output in zip(batch, outputs, strict=True)]
                if partial is not None:
                    with open(partial, "a", encoding="utf-8", newline="\n") as file:
                        file.writelines(map(_line, new))
                known |= {prediction.fingerprint: prediction for prediction in new}
                progress.update(len(new))
    finally:
        model.train(was_training)
    predictions = [known[fingerprint] for fingerprint in fingerprints]
    if path is not None:
        write_predictions(predictions, path)
        partial.unlink(missing_ok=True)
    return predictions


def _predict_batch(model, processor, rows: Sequence[SafetyRow]) -> list[dict]:
    """What the head says about rows that all have images."""
    import torch

    texts = [processor.apply_chat_template(_question(row), add_generation_prompt=True) for row in rows]
    inputs = processor(
        images=[row.load_images() for row in rows],
        text=texts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    ).to(model.device, model.dtype)
    with torch.no_grad():
        features = model.encode_images(**inputs)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        parts = model.prompt_parts(ids, mask, inputs.get("safety_question_mask"))
        readings = model.predict_readings(ids, mask, features, parts)
    several_turns = (parts.questions != parts.newest).any(dim=1).tolist()
    found = [{"level_logits": [], "category_logits": [], "whole_conversation": []} for _ in rows]
    for number, reading in enumerate(readings):
        levels, categories = (
            reading.level_logits.float().tolist(),
            reading.category_logits.float().tolist(),
        )
        for i, level, category in zip(reading.rows.tolist(), levels, categories, strict=True):
            if not all(map(math.isfinite, level + category)):
                raise ValueError(
                    f"row {rows[i].row_id!r}: the safety head's logits are not finite in {model.dtype}; load the "
                    f"model in bfloat16 or float32."
                )
            found[i]["level_logits"].append(tuple(level))
            found[i]["category_logits"].append(tuple(category))
            found[i]["whole_conversation"].append(number == 0 and several_turns[i])  # the first is of all turns
    return [{name: tuple(values) for name, values in output.items()} for output in found]


def _question(row: SafetyRow) -> list[dict]:
    """The conversation without a last answer: what the model is asked at inference."""
    return row.messages[:-1] if row.messages[-1]["role"] == "assistant" else row.messages


def _text_length(row: SafetyRow) -> int:
    return sum(len(part.get("text", "")) for turn in _question(row) for part in turn["content"])


# -- fingerprints and lines ------------------------------------------------------------------------------------------


def _weights_hash(module) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(whole_state_dict(module).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _image_hashes(rows: Sequence[SafetyRow]) -> list[tuple[str, ...]]:
    """Per row, of its images' content: copies of a file under two names are one image. Each file is read once."""
    known: dict[str, str] = {}
    for image in (image for row in rows for image in row.images):
        key = image_key(image)
        if key not in known:
            content = image_file(image)
            known[key] = (key if content is None else hashlib.sha256(content).hexdigest())[:16]
    return [tuple(known[image_key(image)] for image in row.images) for row in rows]


def _fingerprint(row: SafetyRow, images: tuple[str, ...], weights: str) -> str:
    content = [row.row_id, row.source, row.level, row.category, row.messages, images, weights]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _line(prediction: HeadPrediction) -> str:
    return json.dumps(asdict(prediction), ensure_ascii=False) + "\n"


def _whole_lines(path: Path) -> dict[str, HeadPrediction]:
    """Predictions by fingerprint; none if there is no file. Cuts off a last line that an interruption left torn."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return {prediction.fingerprint: prediction for prediction in read_predictions(path)}


def _parse(line: str, where: str) -> HeadPrediction:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is no valid JSON ({error}); delete the file to predict again.") from None
    names = {field.name for field in fields(HeadPrediction)}
    if not isinstance(record, dict) or record.keys() != names:
        raise DataError(
            f"{where} is no prediction of this version, whose fields are {', '.join(sorted(names))}; delete the "
            f"file to predict again."
        )
    for name in ("level_logits", "category_logits"):
        record[name] = tuple(map(tuple, record[name]))
    for name in ("whole_conversation", "images"):
        record[name] = tuple(record[name])
    return HeadPrediction(**record)
