"""FigStep: harmful instructions spelled in pictures. The prompt, the same for all, is in `taxonomies/figstep.yaml`."""

from __future__ import annotations

from .fields import identifier, image_list, single_turn
from .row_format import Context, RowFormat


def _parse(record: dict, *, context: Context, **_) -> dict:
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


FIGSTEP = RowFormat(lambda record: {"dataset", "category_id", "task_id", "category_name"} <= record.keys(), _parse)
