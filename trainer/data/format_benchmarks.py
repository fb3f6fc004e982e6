"""Published safety sets whose records a list of field names cannot describe. Their labels are in `taxonomies/`."""

from __future__ import annotations

from pathlib import PurePosixPath

from .errors import DataError
from .format_base import Context, RowFormat, identifier, image_list, optional_text, single_turn, text_field
from .record_fields import other_fields
from .schema import short

_VLGUARD_INSTRUCTIONS = ("instruction", "safe_instruction", "unsafe_instruction")
_MM_SAFETYBENCH_KINDS = {
    # Kind of image -> the question asked with it, as in the paper (arXiv 2311.17600): SD pictures show the key phrase,
    # so the question says "this activity"; TYPO pictures spell it, so the question points at the words.
    "SD": "Rephrased Question(SD)",
    "SD_TYPO": "Rephrased Question",
    "TYPO": "Rephrased Question",
}
_RTVLM_QUESTIONS = ("prompt", "questions", "question", "instruction")


def parse_vlguard(record: dict, *, context: Context, **_) -> list[dict]:
    """A row per instruction: one on an unsafe image; a safe and an unsafe one on a safe image."""
    pairs = record.get("instr-resp")
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, dict) for pair in pairs):
        raise DataError(f"`instr-resp` must be a non-empty list of objects, got {short(pairs)}")
    images = image_list(record.get("image"))
    rows = []
    for number, pair in enumerate(pairs, start=1):
        kinds = [kind for kind in _VLGUARD_INSTRUCTIONS if pair.get(kind) is not None]
        if len(kinds) != 1:
            raise DataError(f"`instr-resp` {number} must have one of {list(_VLGUARD_INSTRUCTIONS)}, got {short(pair)}")
        other_fields(pair, {kinds[0], "response"}, has_images=True, where=f"`instr-resp` {number}")
        question = text_field(pair, kinds[0])
        row = {"images": images, "messages": single_turn(len(images), question, optional_text(pair, "response"))}
        if record.get("id") is not None:
            row["row_id"] = f"{identifier(record, 'id')}-{kinds[0]}"
        facts = {**record, **context.facts, "$instruction": kinds[0]}
        rows.append({**row, "facts": facts, "used": {"id", "image", "instr-resp"}})
    return rows


def parse_rtvlm(record: dict, *, context: Context, **_) -> list[dict]:
    """A row per question; the tasks differ in how they name questions and images."""
    given = [name for name in _RTVLM_QUESTIONS if record.get(name) is not None]
    if len(given) > 1:
        raise DataError(f"the question is given more than once, in {given}; keep one of them")
    field = given[0] if given else _RTVLM_QUESTIONS[0]
    questions = record.get(field)
    several = isinstance(questions, list)
    count = len(questions) if several else 1
    if count == 0:
        raise DataError(f"`{field}` is an empty list; drop the row")
    answers = record.get("answers")
    if isinstance(answers, list) and not (several and len(answers) == count):
        raise DataError(f"`answers` must be a text, or one for each of `{field}` ({count}), got {short(answers)}")
    images = _rtvlm_images(record, context)
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


def _rtvlm_images(record: dict, context: Context) -> list[str]:
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


def parse_figstep(record: dict, *, context: Context, **_) -> dict:
    """The harmful instruction is spelled in the picture; the prompt, the same for all, is the taxonomy's."""
    category, task = identifier(record, "category_id"), identifier(record, "task_id")
    dataset = identifier(record, "dataset")
    images = image_list(f"query_{dataset}_{category}_{task}_6.png")
    return {
        "row_id": f"{dataset}_{category}_{task}",
        "images": images,
        "messages": single_turn(len(images), context.taxonomy.prompt),
        "facts": {**record, **context.facts},
        "used": {"dataset", "category_id", "task_id"},
    }


def parse_mm_safetybench(record: dict, *, context: Context, **_) -> list[dict]:
    """Three rows: the record's id times the kinds of image. The file's name is the scenario, the kind is the split."""
    number, scenario = identifier(record, "id"), context.stem
    return [
        {
            "row_id": f"{scenario}-{number}-{kind}",
            "images": image_list(f"imgs/{scenario}/{kind}/{number}.jpg"),
            "messages": single_turn(1, text_field(record, question)),
            "split": kind,
            "facts": {**record, **context.facts},
            "used": {"id", question},
        }
        for kind, question in _MM_SAFETYBENCH_KINDS.items()
    ]


BENCHMARK_FORMATS: dict[str, RowFormat] = {
    "vlguard": RowFormat(lambda record: "instr-resp" in record, parse_vlguard),
    "rtvlm": RowFormat(
        lambda record: "refused_to_answer" in record and any(name in record for name in _RTVLM_QUESTIONS), parse_rtvlm
    ),
    "figstep": RowFormat(
        lambda record: {"dataset", "category_id", "task_id", "category_name"} <= record.keys(), parse_figstep
    ),
    "mm_safetybench": RowFormat(
        lambda record: {"Question", "Rephrased Question"} <= record.keys(), parse_mm_safetybench, spans_files=True
    ),
}
