"""An lmms-eval task over rows in our schema: the class of every task in `tasks/`.

A YAML file in `tasks/` says where the rows are under the data folder and how they are read; everything else is here.
Rows are read by [`read_rows`], images lazily and with its checks. An answer's measures depend on its row's kind
(`kind` in the YAML file, or by the row's level; see [`score_answer`]):

- harmful: a level above the lowest risk, or the only level with risk;
- benign: the level without risk;
- other: the lowest of several levels with risk, or an unknown level.

The data folder comes from the environment variable `SAFEVLM_EVAL_DATA`, so the tasks also run from lmms-eval's own
command. `SAFEVLM_EVAL_LABELS` names the model whose labels a user's own rows have, if they are not the paper's.

    SAFEVLM_EVAL_DATA=data lmms-eval --include_path trainer/evaluation/benchmarks/tasks --model safevlm --tasks ...
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from lmms_eval.api.task import ConfigurableMessagesTask

from safevlm.trainer.data import SafetyRow
from safevlm.trainer.evaluation.measure_table import measures_of

from .answer_measures import score_answer
from .answering import question_text
from .task_rows import task_labels, task_rows

DATA_VARIABLE = "SAFEVLM_EVAL_DATA"


class SafetyTask(ConfigurableMessagesTask):
    """`config.metadata` holds `rows` (see [`task_rows`]) and, if needed, `kind` and `exact_match`."""

    def __init__(self, config: dict):
        # The YAML file's `class` is not a field of lmms-eval's configuration.
        config = {name: value for name, value in config.items() if name != "class"}
        metrics = [
            {"metric": measure.name, "aggregation": mean, "higher_is_better": measure.higher_is_better}
            for measure in measures_of("task")
        ]
        super().__init__(config={**config, "metric_list": metrics})

    def download(self, dataset_kwargs=None) -> None:
        folder = os.environ.get(DATA_VARIABLE)
        if not folder:
            raise ValueError(f"Task {self.config.task!r} needs the data folder: set {DATA_VARIABLE}.")
        settings = self.config.metadata
        self.labels = task_labels(settings)
        self.rows = task_rows(Path(folder), self.config.task, **settings["rows"], labels=self.labels)
        docs = [self._doc(i, row, settings.get("kind")) for i, row in enumerate(self.rows)]
        self.dataset = {"test": Dataset.from_list(docs)}
        self.dataset_no_image = self.dataset

    def _doc(self, index: int, row: SafetyRow, kind: str | None) -> dict[str, Any]:
        answer = None
        if row.messages[-1]["role"] == "assistant":
            answer = "".join(part["text"] for part in row.messages[-1]["content"])
        return {
            "index": index,
            "row_id": row.row_id,
            "prompt": question_text(row.messages),
            "kind": kind or _kind(row.level, self.labels.level_names),
            "category": None if row.category is None else self.labels.category_names[row.category],
            "level": None if row.level is None else self.labels.level_names[row.level],
            "source": row.source,
            "reference": answer,
            "exact_match": bool(self.config.metadata.get("exact_match")),
        }

    def doc_to_messages(self, doc: dict, **kwargs) -> list[dict]:
        row = self.rows[doc["index"]]
        images = iter(row.load_images())
        messages = row.messages[:-1] if row.messages[-1]["role"] == "assistant" else row.messages
        return [
            {
                **message,
                "content": [
                    {"type": "image", "url": next(images)} if part["type"] == "image" else part
                    for part in message["content"]
                ],
            }
            for message in messages
        ]


def _kind(level: int | None, level_names: Sequence[str]) -> str:
    if level is None or level == 1 < len(level_names) - 1:
        return "other"
    return "harmful" if level else "benign"


def score(doc: dict, results: list[str]) -> dict[str, float]:
    """lmms-eval's `process_results`: the measures of one item."""
    return score_answer(doc["kind"], doc["prompt"], results[0], doc["reference"] if doc["exact_match"] else None)


def mean(values: list[float]) -> float:
    """lmms-eval's `aggregation` of all our measures."""
    return sum(values) / len(values)
