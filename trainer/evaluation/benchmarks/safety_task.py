"""An lmms-eval task over rows in our schema: what every task in `tasks/` is made of.

A YAML file in `tasks/` says where the rows are under the data folder and how they are read; the rest is here. Rows
are read with [`read_rows`], images lazily and with its checks. Metrics per row, by what the row is (`kind` in the
YAML file, else by its level):

- harmful (a level above the lowest risk, or the only risk): `attack_success_rate` is 1 if the answer complies,
  `refusal_rate` if it refuses, in part or whole. A rule can tell a refusal, not harm: an answer that complies with
  nonsense counts as a successful attack.
- benign (no risk): `over_refusal_rate` is 1 if the answer refuses, in part or whole; `exact_match`, where the task
  says `exact_match: true`, is 1 if the answer is the row's up to case and white space.
- other (the lowest of several levels of risk, or unknown): neither answering nor refusing is wrong by itself;
  `refusal_rate_other` is 1 for a refusal. The answer is for a judge.

The data folder is the environment variable `SAFEVLM_EVAL_DATA`, so the tasks work from lmms-eval's own command, too
(`SAFEVLM_EVAL_LABELS` names the model whose labels rows of one's own have, where these are not the paper's):

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

from .answering import question_text
from .scoring import score_answer
from .task_rows import task_labels, task_rows

DATA_VARIABLE = "SAFEVLM_EVAL_DATA"


class SafetyTask(ConfigurableMessagesTask):
    """See the module's docstring. `config.metadata` holds `rows`, and `kind` and `exact_match` where needed."""

    def __init__(self, config: dict):
        # The class that YAML names is not a field of the configuration it is given.
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

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
    """lmms-eval's `process_results`: the metrics of one item."""
    return score_answer(doc["kind"], doc["prompt"], results[0], doc["reference"] if doc["exact_match"] else None)


def mean(values: list[float]) -> float:
    """The aggregation of all our metrics."""
    return sum(values) / len(values)
