"""VLGuard: a picture with one or two instructions. Its labels are in `taxonomies/vlguard.yaml`."""

from __future__ import annotations

from safevlm.trainer.data.errors import DataError, short

from .fields import identifier, image_list, optional_text, single_turn, text_field
from .row_format import Context, RowFormat
from .unused_fields import unused_fields

_INSTRUCTIONS = ("instruction", "safe_instruction", "unsafe_instruction")


def _parse(record: dict, *, context: Context, **_) -> list[dict]:
    """A row per instruction: one on an unsafe image; a safe and an unsafe one on a safe image."""
    pairs = record.get("instr-resp")
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, dict) for pair in pairs):
        raise DataError(f"`instr-resp` must be a non-empty list of objects, got {short(pairs)}")
    images = image_list(record.get("image"))
    rows = []
    for number, pair in enumerate(pairs, start=1):
        kinds = [kind for kind in _INSTRUCTIONS if pair.get(kind) is not None]
        if len(kinds) != 1:
            raise DataError(f"`instr-resp` {number} must have one of {list(_INSTRUCTIONS)}, got {short(pair)}")
        unused_fields(pair, {kinds[0], "response"}, has_images=True, where=f"`instr-resp` {number}")
        question = text_field(pair, kinds[0])
        row = {"images": images, "messages": single_turn(len(images), question, optional_text(pair, "response"))}
        if record.get("id") is not None:
            row["row_id"] = f"{identifier(record, 'id')}-{kinds[0]}"
        facts = {**record, **context.facts, "$instruction": kinds[0]}
        rows.append({**row, "facts": facts, "used": {"id", "image", "instr-resp"}})
    return rows


VLGUARD = RowFormat(lambda record: "instr-resp" in record, _parse)
