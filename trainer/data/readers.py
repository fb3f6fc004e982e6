"""From data files to `SafetyExample`s: one loop over records, and one parse function per record format.

A *container* (JSON list or JSONL) yields records; a *format* (the PSA-VLM/SafeVLM rows, LLaVA-Instruct) turns one
record into images, messages and labels. Both are recognised by content. `register_format` adds a format. No row is
altered silently: a bad one raises `DataError`, or with `on_error="skip"` is left out and listed in `Rows.skipped`.

Differences from the reference loader (method.md, fault 5): `image_folder` is respected, unreadable images are never
replaced, a conversation that does not begin with the user is an error instead of losing its first turn, and the two
images of `a<split>b` stay two images instead of being pasted into one.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .errors import DataError
from .images import MAX_PIXELS, load_image, probe_image
from .schema import CATEGORY_NAMES, LEVEL_NAMES, SafetyExample, check_text, label_ids, safe_category_id, short

logger = logging.getLogger(__name__)

IMAGE_MARKER = "<image>"
IMAGE_SEPARATOR = "<split>"
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


class Rows(list[SafetyExample]):
    """The rows read, in file order. `skipped` holds `(row_id, reason)` for each row left out by `on_error="skip"`."""

    def __init__(self, rows: Sequence[SafetyExample] = (), skipped: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(rows)
        self.skipped = list(skipped)


class RowFormat(NamedTuple):
    """A record format.

    Args:
        matches (`Callable[[dict], bool]`): Whether a record looks like this format, by its keys.
        parse (`Callable`): `parse(record, *, category_names, level_names, assume_safe)` returns a dict with `images`
            (names relative to the image folder), `messages`, `category` and `level`, or raises `DataError`.
    """

    matches: Callable[[dict], bool]
    parse: Callable[..., dict[str, Any]]


def read_rows(
    path: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    *,
    format: str | None = None,
    category_names: Sequence[str] = CATEGORY_NAMES,
    level_names: Sequence[str] = LEVEL_NAMES,
    assume_safe: bool = False,
    require_answer: bool = True,
    check_images: Literal["full", "header", "none"] = "full",
    max_pixels: int = MAX_PIXELS,
    on_error: Literal["raise", "skip"] = "raise",
    source: str | None = None,
) -> Rows:
    """Reads a JSON list or JSONL file of any registered format.

    Args:
        path (`str` or `os.PathLike`): The data file.
        image_folder (`str` or `os.PathLike`, *optional*): Image paths are relative to it and may not leave it;
            absolute ones must lie inside. Symbolic links inside it are followed. Defaults to the folder of `path`.
        format (`str`, *optional*): A registered name; recognised from the content when omitted.
        category_names, level_names (`Sequence[str]`, *optional*): The label names in order. Integer labels in the
            file are indices into them. Default to the paper's seven categories and four levels.
        assume_safe (`bool`, *optional*, defaults to `False`): Whether rows of formats without labels become safe,
            level 0. Otherwise their `category` and `level` are `None`.
        require_answer (`bool`, *optional*, defaults to `True`): Whether the last turn must be the assistant's, as
            training needs.
        check_images (`"full"`, `"header"` or `"none"`, *optional*, defaults to `"full"`): `"full"` decodes every image
            once, some milliseconds each, so that training cannot stop at a broken one hours later; `"header"` finds
            missing files, refused formats and sizes; `"none"` looks at no file.
        max_pixels (`int`, *optional*, defaults to 50,000,000): Largest image, width x height.
        on_error (`"raise"` or `"skip"`, *optional*, defaults to `"raise"`): What to do with a bad row.
        source (`str`, *optional*): The rows' `source`. Defaults to the file's name without extension.

    Returns:
        `Rows`: A list of `SafetyExample`. A row's id is the record's `id`, else `"<file name>:<number>"`, counting
        lines (JSONL) or items (list) from 1.

    Raises:
        `DataError`: A bad row with `on_error="raise"`; an unreadable file, folder or unknown format in any case. It is
            an `ImageError` where the image is at fault.
    """
    for name, value, allowed in (
        ("on_error", on_error, ("raise", "skip")),
        ("check_images", check_images, ("full", "header", "none")),
    ):
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")
    path = Path(path)
    folder = Path(os.path.abspath(path.parent if image_folder is None else image_folder))
    if not folder.is_dir():
        raise DataError(f"`image_folder` {str(folder)!r} is not a folder.")
    unit, records = _read_records(path)
    parse = _lookup(format or _recognise(path, records)).parse
    labels = {"category_names": category_names, "level_names": level_names, "assume_safe": assume_safe}
    source = path.stem if source is None else source

    rows, seen = Rows(), set()
    for number, record in records:
        row_id = f"{path.name}:{number}"
        try:
            record = _decode(record)
            row_id = _row_id(record, default=row_id)
            fields = parse(record, **labels)
            fields["images"] = [_resolve(image, folder) for image in fields["images"]]
            row = SafetyExample(row_id=row_id, source=source, **fields)
            if require_answer and row.messages[-1]["role"] != "assistant":
                raise DataError("the last turn is not the assistant's; add the answer or pass `require_answer=False`")
            for image in row.images:
                if check_images != "none" and image not in seen:
                    check = load_image if check_images == "full" else probe_image
                    check(image, max_pixels=max_pixels, row_id=row_id)
                    seen.add(image)
        except DataError as error:
            error.args = (f"{path}, {unit} {number}: {error}",)
            if on_error == "raise":
                raise
            rows.skipped.append((row_id, str(error)))
        else:
            rows.append(row)
    if rows.skipped:
        total = len(rows) + len(rows.skipped)
        logger.warning("%s: skipped %d of %d rows, the first: %s", path, len(rows.skipped), total, rows.skipped[0][1])
    return rows


def read_safevlm_jsonl(path: str | os.PathLike, image_folder: str | os.PathLike | None = None, **options) -> Rows:
    """Reads PSA-VLM/SafeVLM rows: `safe_type`, `safe_level`, `image`, `conversations` (roles USER and ASSISTANT).

    Both labels are required, as an index or a name. `a<split>b` in `image` means two images. Options as `read_rows`.
    """
    return read_rows(path, image_folder, format="safevlm", **options)


def read_llava_json(path: str | os.PathLike, image_folder: str | os.PathLike | None = None, **options) -> Rows:
    """Reads LLaVA-Instruct rows: `id`, `image` (path, list, or missing), `conversations` (roles human and gpt).

    An optional `system_prompt` becomes the system turn. The format has no labels: see `assume_safe`. Options as
    `read_rows`.
    """
    return read_rows(path, image_folder, format="llava", **options)


def detect_format(path: str | os.PathLike) -> str:
    """The name of the registered format that a data file is in, from its first recognisable record.

    Raises:
        `DataError`: The file cannot be read, or no record matches a format.
    """
    return _recognise(Path(path), _read_records(Path(path))[1])


def register_format(name: str, row_format: RowFormat) -> None:
    """Adds a format to `read_rows`. Formats are tried in order of registration, the package's own first.

    Raises:
        `ValueError`: The name is taken.
    """
    if name in _FORMATS:
        raise ValueError(f"`name` must be new, got {name!r}; registered are {sorted(_FORMATS)}.")
    _FORMATS[name] = row_format


# --- formats


def _parse_safevlm(record: dict, *, category_names: Sequence[str], level_names: Sequence[str], **_) -> dict[str, Any]:
    for field in ("safe_type", "safe_level"):
        if field not in record:
            raise DataError(f"`{field}` is missing; label the row, or keep unlabelled rows in a LLaVA-Instruct file")
    try:
        category, level = label_ids(record["safe_type"], record["safe_level"], category_names, level_names)
    except DataError as error:
        raise DataError(f"`safe_type`/`safe_level`: {error}") from None
    image = record.get("image")
    images = _image_names(image.split(IMAGE_SEPARATOR) if isinstance(image, str) else image)
    # In this format one marker stands for all images of the row.
    messages = _messages(record, len(images), one_marker_for_all=True)
    return {"images": images, "messages": messages, "category": category, "level": level}


def _parse_llava(record: dict, *, category_names: Sequence[str], assume_safe: bool, **_) -> dict[str, Any]:
    if "safe_type" in record or "safe_level" in record:
        raise DataError("the row has `safe_type` or `safe_level`, which this format ignores; read it as 'safevlm'")
    image = record.get("image")
    images = _image_names([image] if isinstance(image, str) else image)
    category, level = (safe_category_id(category_names), 0) if assume_safe else (None, None)
    return {"images": images, "messages": _messages(record, len(images)), "category": category, "level": level}


_FORMATS: dict[str, RowFormat] = {
    "safevlm": RowFormat(lambda record: "safe_type" in record or "safe_level" in record, _parse_safevlm),
    "llava": RowFormat(lambda record: "conversations" in record, _parse_llava),
}


def _lookup(name: str) -> RowFormat:
    if name not in _FORMATS:
        raise ValueError(f"`format` must be one of {sorted(_FORMATS)}, got {name!r}.")
    return _FORMATS[name]


def _image_names(images: Any) -> list[str]:
    if images is None:
        return []
    if not isinstance(images, list) or not all(isinstance(name, str) and name.strip() for name in images):
        raise DataError(f"`image` must be a path or a list of paths, got {short(images)}; leave it out for text only")
    if any("\0" in check_text(name, "`image`") for name in images):
        raise DataError(f"`image` {short(images)} holds a NUL character; correct the path")
    return images


def _messages(record: dict, num_images: int, one_marker_for_all: bool = False) -> list[dict[str, Any]]:
    conversations = record.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise DataError(f"`conversations` must be a non-empty list of turns, got {short(conversations)}")
    turns = [_turn(turn, number) for number, turn in enumerate(conversations, start=1)]
    markers = sum(text.count(IMAGE_MARKER) for role, text in turns if role == "user")
    # Without a marker the image goes first, as in LLaVA.
    copies = max(num_images, 1) if one_marker_for_all and markers <= 1 else 1
    missing = num_images > 0 and markers == 0 and (one_marker_for_all or num_images == 1)
    if not missing and markers * copies != num_images:
        raise DataError(f"{num_images} in `image` but {markers} {IMAGE_MARKER} in the user turns; make them agree")

    messages = []
    for role, text in turns:
        pieces = re.split(f"\n?({IMAGE_MARKER})\n?", text) if role == "user" else [text]
        content = []
        if role == "user" and missing:
            content, missing = [{"type": "image"} for _ in range(copies)], False
        for piece in pieces:
            if piece == IMAGE_MARKER and role == "user":
                content += [{"type": "image"} for _ in range(copies)]
            elif piece.strip():
                content.append({"type": "text", "text": piece})
        messages.append({"role": role, "content": content})
    system = record.get("system_prompt")
    if system not in (None, ""):
        text = check_text(system, "`system_prompt`")
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": text}]})
    return messages


def _turn(turn: Any, number: int) -> tuple[str, str]:
    where = f"`conversations` turn {number}"
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise DataError(f"{where} must be an object with 'from' and 'value', got {short(turn)}")
    speaker = turn["from"]
    role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise DataError(f"{where}: `from` must be one of {sorted(_ROLES)} in any case, got {short(speaker)}")
    return role, check_text(turn["value"], f"{where}, `value`")


# --- containers


def _read_records(path: Path) -> tuple[str, list[tuple[int, Any]]]:
    """("item", numbered values) of a JSON list, or ("line", numbered undecoded lines) of a JSONL file."""
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path.") from error
    if data.lstrip()[:1] == b"[":
        try:
            unit, records = "item", list(enumerate(_decode_json(data), start=1))
        except DataError as error:
            raise DataError(f"{path}: {error}; as one JSON list it cannot be read in part.") from error
    else:
        lines = enumerate(data.split(b"\n"), start=1)  # not splitlines: JSON strings may hold other line separators
        unit, records = "line", [(number, line) for number, line in lines if line.strip()]
    if not records:
        raise DataError(f"{path}: has no rows.")
    return unit, records


def _decode(record: Any) -> dict:
    if isinstance(record, bytes):
        record = _decode_json(record)
    if not isinstance(record, dict):
        raise DataError(f"a row must be a JSON object, got {short(record)}")
    return record


def _decode_json(data: bytes) -> Any:
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, an integer of thousands of digits
        raise DataError(f"invalid JSON ({error})") from None


def _decoded(records: list[tuple[int, Any]]) -> Iterator[dict]:
    for _, record in records:
        try:
            yield _decode(record)
        except DataError:
            continue


def _recognise(path: Path, records: list[tuple[int, Any]]) -> str:
    first = None
    for record in _decoded(records):
        first = record if first is None else first
        for name, row_format in _FORMATS.items():
            if row_format.matches(record):
                return name
    keys = "no JSON object, one per line or in a list" if first is None else f"the keys {short(sorted(first))}"
    raise DataError(f"{path}: has no known format, it has {keys}; known formats are {sorted(_FORMATS)}.")


def _row_id(record: dict, default: str) -> str:
    value = record.get("id")
    if value is None:
        return default
    if type(value) not in (str, int) or value == "":
        raise DataError(f"`id` must be a string or an integer, got {short(value)}")
    return check_text(str(value), "`id`")


def _resolve(name: str, folder: Path) -> Path:
    """Joins lexically: a link inside the folder is its owner's choice, `..` and absolute paths are the data file's."""
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(folder):
        raise DataError(f"`image` {short(name)} leaves `image_folder` {str(folder)!r}; pass the folder it is in")
    return path
