"""RTVLM: red-teaming tasks, which differ in how they name questions and pictures."""

from __future__ import annotations

from pathlib import PurePosixPath

from safevlm.trainer.data.errors import DataError, short

from .fields import identifier, image_list, single_turn, text_field
from .row_format import Context, RowFormat

_QUESTIONS = ("prompt", "questions", "question", "instruction")


def _parse(record: dict, *, context: Context, **_) -> list[dict]:
    """A row per question; the tasks differ in how they name questions and images."""
    given = [name for name in _QUESTIONS if record.get(name) is not None]
    if len(given) > 1:
        raise DataError(f"the question is given more than once, in {given}; keep one of them")
    field = given[0] if given else _QUESTIONS[0]
    questions = record.get(field)
    several = isinstance(questions, list)
    count = len(questions) if several else 1
    if count == 0:
        raise DataError(f"`{field}` is an empty list; drop the row")
    answers = record.get("answers")
    if isinstance(answers, list) and not (several and len(answers) == count):
        raise DataError(f"`answers` must be a text, or one for each of `{field}` ({count}), got {short(answers)}")
    images = _images(record, context)
    name = next((identifier(record, key) for key in ("index", "id") if record.get(key) is not None), None)
    rows = []
    for index in range(count):
        # Lists run in parallel with the questions, other values are for all of them.
        own = {
            key: value[index] if isinstance(value, list) and several and len(value) == count else value
            for key, value in record.items()
        }
        refusal, answer = own.get("refused_to_answer"), own.get("answers")
        # Some tasks have the wanted behaviour where others have an answer; that is no text to learn.
        answer = answer if isinstance(answer, str) and answer != refusal and not _is_behaviour(answer) else None
        row = {"images": images, "messages": single_turn(len(images), text_field(own, field), answer or None)}
        if name is not None:
            row["row_id"] = f"{name}-{index + 1}" if several else name
        # `img` and `answers` name the picture in some tasks.
        used = {field, "id", "index", "img", "answers", "refused_to_answer"}
        rows.append({**row, "facts": {**own, **context.facts}, "used": used})
    return rows


def _is_behaviour(answer: str) -> bool:
    return answer.casefold() in ("refuse to answer", "proceed with caution", "answer with caution", "safe to answer")


def _images(record: dict, context: Context) -> list[str]:
    """The image's name, which the tasks derive from different fields, as the authors' loader does."""
    if context.stem == "visual_misleading_correct" and isinstance(record.get("answers"), str):
        names, folder = [record["answers"]], "flags/"  # the right flag, while `img` is the wrong one
    elif record.get("img") is not None:
        names, folder = record["img"] if isinstance(record["img"], list) else [record["img"]], "flags/"
    else:
        key = "index" if record.get("index") is not None else "id"
        names, folder = [identifier(record, key)], ""
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(f"`img` must be the name of an image or a list of them, got {short(names)}")
    if folder:  # a country's name, with its blanks
        names = ["".join(name.split()) for name in names]
    return image_list([folder + (name if _has_image_suffix(name) else f"{name}.jpg") for name in names], "img")


def _has_image_suffix(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def _matches(record: dict) -> bool:
    return "refused_to_answer" in record and any(name in record for name in _QUESTIONS)


RTVLM = RowFormat(_matches, _parse)
