"""The record formats, by name. To add one, write a file beside these and list its `RowFormat` in `FORMATS`.

Chat-like formats are in `conversations.py` and `messages.py`; published safety sets have a file each. A set with one
row per record needs no code: a YAML file in `taxonomies/` names its fields, and `flat.py` reads it.
"""

from safevlm.trainer.data.errors import DataError

from .conversations import LLAVA, SAFEVLM
from .figstep import FIGSTEP
from .flat import FLAT, flat_formats
from .messages import CHAT, MLLM
from .mm_safetybench import MM_SAFETYBENCH
from .row_format import Context, RowFormat
from .rtvlm import RTVLM
from .vlguard import VLGUARD

__all__ = ["FORMATS", "Context", "RowFormat", "format_of", "known_formats", "register_format"]

FORMATS: dict[str, RowFormat] = {
    "safevlm": SAFEVLM,
    "llava": LLAVA,
    "mllm": MLLM,
    "chat": CHAT,
    "vlguard": VLGUARD,
    "rtvlm": RTVLM,
    "figstep": FIGSTEP,
    "mm_safetybench": MM_SAFETYBENCH,
}


def register_format(name: str, row_format: RowFormat) -> None:
    """Adds a format to `read_rows`. For a set with one row per record, a taxonomy with `fields` is enough.

    Raises:
        `ValueError`: The name is taken.
    """
    if name in known_formats():
        raise ValueError(f"`name` must be new, got {name!r}; known are {sorted(known_formats())}.")
    FORMATS[name] = row_format


def known_formats() -> dict[str, RowFormat]:
    """All formats by name: those of this package and those added by `register_format`."""
    return {**FORMATS, **flat_formats(), "flat": FLAT}


def format_of(record: dict) -> str | None:
    """The name of the one format that fits a record, or `None`.

    Raises:
        `DataError`: Several formats fit.
    """
    matching = [name for name, row_format in known_formats().items() if row_format.matches(record)]
    if len(matching) > 1:
        raise DataError(f"could be of the formats {matching}; choose one with `format`")
    return matching[0] if matching else None
