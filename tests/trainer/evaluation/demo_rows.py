"""Held-out rows of the demo's picture world as the data of the tasks `own` and `own_lookalikes`.

python tests/trainer/evaluation/demo_rows.py DATA_FOLDER
"""

import sys
from dataclasses import replace
from pathlib import Path

from safevlm.safety_policy import SafetyPolicy
from safevlm.trainer.data import write_safevlm_jsonl
from safevlm.trainer.demo.answers import to_row
from safevlm.trainer.demo.picture_world.examples import make_examples

LOOKALIKES = ("lookalike", "risky_sounding")


def write_demo_rows(data: Path, num_pictures: int = 100, seed: int = 1000) -> dict[str, int]:
    """Writes `data/own/rows.jsonl`, `lookalikes.jsonl` and their pictures; returns the numbers of rows."""
    folder = data / "own"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = {"rows": [], "lookalikes": []}
    for number, example in enumerate(make_examples("test", num_pictures, seed)):
        path = folder / "images" / f"{number}.png"
        example.image.save(path)
        row = replace(
            to_row(example, SafetyPolicy()),
            images=(path,),
            row_id=f"{example.kind}-{number}",
            source=example.kind,
        )
        rows["lookalikes" if example.kind in LOOKALIKES else "rows"].append(row)
    for name, part in rows.items():
        write_safevlm_jsonl(part, folder / f"{name}.jsonl", folder)
    return {name: len(part) for name, part in rows.items()}


if __name__ == "__main__":
    sys.stdout.write(f"{write_demo_rows(Path(sys.argv[1]))}\n")
