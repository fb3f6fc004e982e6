"""Uses the saved model in a process that cannot import safevlm."""

import json
import os
import subprocess
import sys
from pathlib import Path

from .evaluation import Record

SCRIPT = Path(__file__).with_name("use_saved_model.py")


def use_in_fresh_process(model_dir: str | Path, requests: list[dict]) -> list[dict]:
    """
    Answers `requests` (`image` path and `question`) through the stock pipeline.

    Returns:
        `list[dict]`: Each request with its `answer` and `safety`.

    Raises:
        `RuntimeError`: The process failed; its output is in the message.
    """
    process = subprocess.run(
        # -P: the script's folder is not searched for modules.
        [sys.executable, "-P", str(SCRIPT), str(Path(model_dir).resolve()), json.dumps(requests)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        timeout=600,
    )
    lines = [line for line in process.stdout.splitlines() if line.startswith("ANSWERS ")]
    if process.returncode or not lines:
        raise RuntimeError(f"The saved model failed in a fresh process:\n{process.stdout}\n{process.stderr}")
    return json.loads(lines[-1].removeprefix("ANSWERS "))


def pair_requests(records: list[Record], path: Path) -> list[dict]:
    """An ordinary and a risky question about one picture of level 3, which is saved at `path`."""
    pairs: dict[int, dict[str, Record]] = {}
    for record in records:
        if record.example.pair_id is not None:
            pairs.setdefault(record.example.pair_id, {})[record.example.kind] = record
    pair = next(pair for pair in pairs.values() if pair["pair_risky"].example.level == 3)
    pair["pair_risky"].example.image.save(path)
    return [
        {"image": str(path.resolve()), "question": pair[kind].example.question}
        for kind in ("pair_benign", "pair_risky")
    ]
