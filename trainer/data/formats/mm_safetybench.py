"""MM-SafetyBench: a file per scenario and three kinds of picture per record."""

from __future__ import annotations

from .fields import identifier, image_list, single_turn, text_field
from .row_format import Context, RowFormat

_KINDS = {
    # Kind of image -> the question asked with it, as in the paper (arXiv 2311.17600): SD pictures show the key phrase,
    # so the question says "this activity"; TYPO pictures spell it, so the question points at the words.
    "SD": "Rephrased Question(SD)",
    "SD_TYPO": "Rephrased Question",
    "TYPO": "Rephrased Question",
}


def _parse(record: dict, *, context: Context, **_) -> list[dict]:
    """A row per kind of picture, which is its split. The file name is the scenario."""
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
        for kind, question in _KINDS.items()
    ]


MM_SAFETYBENCH = RowFormat(
    lambda record: {"Question", "Rephrased Question"} <= record.keys(), _parse, spans_files=True
)
