"""Judgements on disk, written as they arrive: a killed run resumes where it stopped and pays for nothing twice."""

import json
import os
import threading

from safevlm.files import JsonLines

from .judgements import Judgement


class JudgementCache:
    """
    Judgements by key, as JSON lines of `{"key": ..., <the judgement's fields>}`. Safe to use from several threads.

    Args:
        path (`str` or `os.PathLike`, *optional*): The file, created with the first judgement. `None`: memory only.
    """

    def __init__(self, path: str | os.PathLike | None = None):
        self._lines = None if path is None else JsonLines(path)
        self._judgements: dict[str, Judgement] = {}
        self._lock = threading.Lock()
        for number, line in () if self._lines is None else self._lines.read():
            try:
                record = json.loads(line)
                key = record.pop("key")
                self._judgements[key] = Judgement(**record)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"Judgement cache {path}, line {number} is not a judgement ({error}): remove the line, or use "
                    "another file."
                ) from None

    def __len__(self) -> int:
        return len(self._judgements)

    def get(self, key: str) -> Judgement | None:
        return self._judgements.get(key)

    def add(self, key: str, judgement: Judgement):
        """Keeps a judgement, which is on the disk when this returns."""
        with self._lock:
            self._judgements[key] = judgement
            if self._lines is not None:
                self._lines.append([{"key": key, **judgement.to_dict()}])
