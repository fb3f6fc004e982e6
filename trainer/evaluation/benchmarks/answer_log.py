"""Answers on disk as they are given, so that a killed run resumes where it stopped.

JSON lines, one per item: `task`, `doc_id`, `prompt`, `answer`, `verdict`.
"""

from __future__ import annotations

import json
import os
from typing import Any

from safevlm.files import JsonLines


class AnswerLog:
    """
    Args:
        path (`str` or `os.PathLike`): The file; read if it exists, appended to by `add`.
    """

    def __init__(self, path: str | os.PathLike):
        self._lines = JsonLines(path)
        self.records: dict[tuple[str, int], dict[str, Any]] = {}
        for number, line in self._lines.read():
            try:
                record = json.loads(line)
                self.records[record["task"], record["doc_id"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not an answer record ({error}); delete the line.") from None

    def find(self, task: str, doc_id: int, prompt: str) -> dict[str, Any] | None:
        """The record of an item, `None` if it is not answered yet; raises `ValueError` if the item has changed."""
        record = self.records.get((task, doc_id))
        if record is not None and record["prompt"] != prompt:
            raise ValueError(
                f"{self._lines.path}: item {doc_id} of {task!r} was answered for the prompt "
                f"{record['prompt'][:80]!r}, but the data now has {prompt[:80]!r}. The data changed; use another "
                f"--output."
            )
        return record

    def add(self, records: list[dict[str, Any]]):
        """Appends `records`. They are on the disk when this returns."""
        self._lines.append(records)
        self.records.update({(record["task"], record["doc_id"]): record for record in records})
