"""RTVLM: red-teaming tasks, each with its own names for questions and pictures."""

from __future__ import annotations

from pathlib import PurePosixPath

from safevlm.trainer.data.errors import DataError, short

from .fields import identifier, image_list, single_turn, text_field
from .row_format import Context, RowFormat

_QUESTIONS = ("prompt", "questions", "question", "instruction")
_BEHAVIOURS = ("refuse to answer", "proceed with caution", "answer with caution", "safe to answer")


def _parse(record: dict, *, context: Context, **_) -> list[dict]:
    """A row per question."""
    field, num_questions = _question_field(record)
    images = _images(record, context)
    record_id = next((identifier(record, key) for key in ("index", "id") if record.get(key) is not None), None)
    rows = []
    for index in range(num_questions or 1):
        single = _single(record, index, num_questions)
        row = {"images": images, "messages": single_turn(len(images), text_field(single, field), _answer(single))}
        if record_id is not None:
            row["row_id"] = f"{record_id}-{index + 1}" if num_questions else record_id
        # `img` and `answers` name the picture in some tasks.
        used = {field, "id", "index", "img", "answers", "refused_to_answer"}
        rows.append({**row, "facts": {**single, **context.facts}, "used": used})
    return rows


def _question_field(record: dict) -> tuple[str, int | None]:
    """The field with the question or the questions, and how many it lists; `None` for a single question."""
    given = [name for name in _QUESTIONS if record.get(name) is not None]
    if len(given) > 1:
        raise DataError(f"the question is given more than once, in {given}; keep one of them")
    field = given[0] if given else _QUESTIONS[0]
    questions, answers = record.get(field), record.get("answers")
    num_questions = len(questions) if isinstance(questions, list) else None
    if num_questions == 0:
        raise DataError(f"`{field}` is an empty list; drop the row")
    if isinstance(answers, list) and len(answers) != num_questions:
        count = num_questions or 1
        raise DataError(f"`answers` must be a text, or one for each of `{field}` ({count}), got {short(answers)}")
    return field, num_questions


def _single(record: dict, index: int, num_questions: int | None) -> dict:
    """The record of one question, with one entry of each list that is as long as the list of questions."""
    return {
        key: value[index] if isinstance(value, list) and len(value) == num_questions else value
        for key, value in record.items()
    }


def _answer(record: dict) -> str | None:
    """The answer, unless it only describes the wanted behaviour, as in some tasks: that is not a text to learn."""
    answer = record.get("answers")
    if not isinstance(answer, str) or answer == record.get("refused_to_answer"):
        return None
    return None if answer.casefold() in _BEHAVIOURS else answer or None


def _images(record: dict, context: Context) -> list[str]:
    """The names of the images, which each task has in another field, as in the authors' loader."""
    if context.stem == "visual_misleading_correct" and isinstance(record.get("answers"), str):
        names, folder = [record["answers"]], "flags/"  # the right flag, while `img` is the wrong one
    elif record.get("img") is not None:
        names, folder = record["img"] if isinstance(record["img"], list) else [record["img"]], "flags/"
    else:
        key = "index" if record.get("index") is not None else "id"
        names, folder = [identifier(record, key)], ""
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(f"`img` must be the name of an image or a list of them, got {short(names)}")
    if folder:  # the file name is a country's name without its blanks
        names = ["".join(name.split()) for name in names]
    return image_list([folder + (name if _has_image_suffix(name) else f"{name}.jpg") for name in names], "img")


def _has_image_suffix(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def _matches(record: dict) -> bool:
    return "refused_to_answer" in record and any(name in record for name in _QUESTIONS)


RTVLM = RowFormat(_matches, _parse)
