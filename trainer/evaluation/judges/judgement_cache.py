"""Judges' verdicts on disk, written as they arrive: a killed run goes on where it stopped and pays nothing twice."""

import json
import os
import threading
from pathlib import Path

from .judgements import Verdict


class VerdictCache:
    """
    JSON lines of `{"key": ..., <the verdict>}`, only ever appended to. A last line that a crash tore is cut off.

    Args:
        path (`str` or `Path`, *optional*): The file, made when the first verdict comes. `None`: memory only.
    """

    def __init__(self, path: str | os.PathLike | None = None):
        self.path = None if path is None else Path(path)
        self._verdicts: dict[str, Verdict] = {}
        self._lock = threading.Lock()
        if self.path is not None and self.path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._verdicts)

    def get(self, key: str) -> Verdict | None:
        return self._verdicts.get(key)

    def add(self, key: str, verdict: Verdict):
        """Keeps a verdict, on disk before this returns."""
        with self._lock:
            self._verdicts[key] = verdict
            if self.path is None:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **verdict.to_dict()}) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def _read(self):
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
                key = record.pop("key")
                self._verdicts[key] = Verdict(**record)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"Verdict cache {self.path}, line {number} is no verdict ({error}): remove the line, or use "
                    "another file."
                ) from None
        if whole < len(data):
            os.truncate(self.path, whole)
