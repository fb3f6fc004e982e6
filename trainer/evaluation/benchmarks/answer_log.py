"""Answers on disk as they are given, so that a killed run goes on where it stopped.

JSON lines, one per item: `task`, `doc_id`, `prompt`, `answer`, `verdict`. A line that a crash cut short is dropped on
reading and written anew.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class AnswerLog:
    """
    Args:
        path (`Path`): The file; read if it exists, appended to by `add`.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.records: dict[tuple[str, int], dict[str, Any]] = {}
        whole = 0
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            for number, line in enumerate(data[:whole].splitlines(), start=1):
                try:
                    record = json.loads(line)
                    self.records[record["task"], record["doc_id"]] = record
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{self.path}, line {number}: no answer record ({error}); delete it.") from None
            if whole < len(data):
                os.truncate(self.path, whole)

    def find(self, task: str, doc_id: int, prompt: str) -> dict[str, Any] | None:
        """The record of an item, `None` where it has not been answered yet; an error where the item has changed."""
        record = self.records.get((task, doc_id))
        if record is not None and record["prompt"] != prompt:
            raise ValueError(
                f"{self.path}: item {doc_id} of {task!r} was answered for the prompt {record['prompt'][:80]!r}, but "
                f"the data now has {prompt[:80]!r}. The data changed; use another --output."
            )
        return record

    def add(self, records: list[dict[str, Any]]):
        """Appends `records` and sees them to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.update({(record["task"], record["doc_id"]): record for record in records})
