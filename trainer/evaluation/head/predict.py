"""Runs the vision tower and the safety head over labelled rows; an interrupted run resumes.

The prompt is the one of inference: the row's turns up to the last question, without its answer.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from safevlm.files import JsonLines
from safevlm.safety_adapter import whole_state_dict
from safevlm.trainer.asking import encode_chats
from safevlm.trainer.data import SafetyRow
from safevlm.trainer.data.images import image_file, image_key

from .predictions import HeadPrediction, parse_prediction, write_predictions


def predict_rows(
    model,
    processor,
    rows: Sequence[SafetyRow],
    batch_size: int = 16,
    device: str | None = None,
    path: str | os.PathLike | None = None,
) -> list[HeadPrediction]:
    """
    Runs the vision tower and the safety head on every row, without generating answers.

    Args:
        model (`SafeVlmForConditionalGeneration`), processor (`SafeVlmProcessor`)
        rows (`Sequence[SafetyRow]`): With or without labels and answers.
        batch_size (`int`): Rows per batch.
        device (`str`, *optional*): The model is moved there first; by default it stays where it is.
        path (`str` or `os.PathLike`, *optional*): JSONL file to write. Predictions already in it, or in the
            `.partial` file of an interrupted run, are reused if row and safety modules are unchanged.

    Returns:
        `list[HeadPrediction]` in the order of `rows`.

    Raises:
        `ImageError`: An image cannot be loaded.
        `ValueError`: The head's logits are not finite.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be 1 or more, got {batch_size}.")
    if device is not None:
        model.to(device)
    records = _records_without_output(rows, model.safety)
    path = None if path is None else Path(path)
    log = None if path is None else JsonLines(path.with_name(path.name + ".partial"))
    known = {} if path is None else {**_read(JsonLines(path)), **_read(log)}
    missing = {record.fingerprint: i for i, record in enumerate(records) if record.fingerprint not in known}
    known |= {fingerprint: records[i] for fingerprint, i in missing.items() if not rows[i].images}  # never assessed
    to_assess = [i for i in missing.values() if rows[i].images]
    # Similar rows together, so that there is little padding; the largest first, so that if they fit, all do.
    to_assess.sort(key=lambda i: (len(rows[i].images), _text_length(rows[i])), reverse=True)
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(rows), initial=len(rows) - len(to_assess), desc="assess", unit="row") as progress:
            for start in range(0, len(to_assess), batch_size):
                batch = to_assess[start : start + batch_size]
                outputs = _predict_batch(model, processor, [rows[i] for i in batch])
                new = [replace(records[i], **output) for i, output in zip(batch, outputs, strict=True)]
                if log is not None:
                    log.append(map(asdict, new))
                known |= {record.fingerprint: record for record in new}
                progress.update(len(new))
    finally:
        model.train(was_training)
    predictions = [known[record.fingerprint] for record in records]
    if path is not None:
        write_predictions(predictions, path)
        log.path.unlink(missing_ok=True)
    return predictions


@torch.no_grad()
def _predict_batch(model, processor, rows: Sequence[SafetyRow]) -> list[dict]:
    """The head's outputs for rows that all have images, as fields of their [`HeadPrediction`]s."""
    inputs = encode_chats(processor, [_question(row) for row in rows], [row.load_images() for row in rows], model)
    features = model.encode_images(**inputs)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    parts = model.prompt_parts(ids, mask, inputs.get("safety_question_mask"))
    several_turns = (parts.questions != parts.newest).any(dim=1).tolist()
    outputs = [{"level_logits": (), "category_logits": (), "whole_conversation": ()} for _ in rows]
    for number, reading in enumerate(model.predict_readings(ids, mask, features, parts)):
        of_all_turns = number == 0
        level_logits = reading.level_logits.float().tolist()
        category_logits = reading.category_logits.float().tolist()
        for row, levels, categories in zip(reading.rows.tolist(), level_logits, category_logits, strict=True):
            if not all(map(math.isfinite, levels + categories)):
                raise ValueError(
                    f"row {rows[row].row_id!r}: the safety head's logits are not finite in {model.dtype}; load the "
                    f"model in bfloat16 or float32."
                )
            outputs[row]["level_logits"] += (tuple(levels),)
            outputs[row]["category_logits"] += (tuple(categories),)
            outputs[row]["whole_conversation"] += (of_all_turns and several_turns[row],)
    return outputs


def _question(row: SafetyRow) -> list[dict]:
    """The conversation without a final answer: what the model is asked at inference."""
    return row.messages[:-1] if row.messages[-1]["role"] == "assistant" else row.messages


def _text_length(row: SafetyRow) -> int:
    return sum(len(part.get("text", "")) for turn in _question(row) for part in turn["content"])


# -- records and their fingerprints ----------------------------------------------------------------------------------


def _records_without_output(rows: Sequence[SafetyRow], safety: torch.nn.Module) -> list[HeadPrediction]:
    """Each row's record before the head has seen it, which is also the record of a row without an image."""
    weights = _weights_hash(safety)
    return [
        HeadPrediction(
            row_id=row.row_id,
            source=row.source,
            level=row.level,
            category=row.category,
            level_logits=(),
            category_logits=(),
            whole_conversation=(),
            images=images,
            fingerprint=_fingerprint(row, images, weights),
        )
        for row, images in zip(rows, _image_hashes(rows), strict=True)
    ]


def _read(log: JsonLines) -> dict[str, HeadPrediction]:
    """The predictions in a file, by fingerprint; none if there is no file."""
    predictions = (parse_prediction(line, f"{log.path}:{number}") for number, line in log.read() if line.strip())
    return {prediction.fingerprint: prediction for prediction in predictions}


def _fingerprint(row: SafetyRow, images: tuple[str, ...], weights: str) -> str:
    content = [row.row_id, row.source, row.level, row.category, row.messages, images, weights]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _weights_hash(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(whole_state_dict(module).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _image_hashes(rows: Sequence[SafetyRow]) -> list[tuple[str, ...]]:
    """
    The hashes of each row's images, by content: copies of a file under two names are one image. Each file is read
    once.
    """
    hashes: dict[str, str] = {}
    for image in (image for row in rows for image in row.images):
        key = image_key(image)
        if key not in hashes:
            content = image_file(image)
            hashes[key] = (key if content is None else hashlib.sha256(content).hexdigest())[:16]
    return [tuple(hashes[image_key(image)] for image in row.images) for row in rows]
