"""Local copies for lmms-eval's tasks: nothing is downloaded, and missing copies are reported before a model is loaded.

lmms-eval's own tasks name a dataset on the Hub. They read the copy at `DIR/<owner>/<name>`, a folder that
`hf download <owner>/<name> --repo-type dataset --local-dir DIR/<owner>/<name>` creates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import lmms_eval.tasks
from lmms_eval.tasks import TaskManager

from safevlm.trainer.data import SafetyRow

from .task_names import ALIASES, TASKS_FOLDER, unknown_task
from .task_rows import task_labels, task_rows

LMMS_TASKS = Path(lmms_eval.tasks.__file__).parent


class LocalTaskManager(TaskManager):
    """
    Finds our tasks and lmms-eval's, with their data under `data`.

    Args:
        data (`Path`): The folder of local copies.
        tasks: The tasks that will be used. If possible only their folders are indexed: indexing all of lmms-eval's
            2,000 tasks takes many seconds.
    """

    def __init__(self, data: Path, tasks: Iterable[str]):
        self.data = Path(data)
        names = [ALIASES.get(task, task) for task in tasks]
        files = [next(folder.rglob(f"{name}.yaml"), None) for name in names for folder in (TASKS_FOLDER, LMMS_TASKS)]
        folders = {str(file.parent) for file in files if file is not None}
        super().__init__(verbosity="WARNING", include_path=[str(TASKS_FOLDER), *folders], include_defaults=False)
        try:
            for name in names:
                list(self.leaves(name))
        except KeyError:  # a task not named after its file, or a group whose tasks are elsewhere
            super().__init__(verbosity="WARNING", include_path=str(TASKS_FOLDER))

    def _get_config(self, name):
        config = super()._get_config(name)
        if "class" not in config and (hub_name := config.get("dataset_path")):
            copy = self.data / hub_name
            if not copy.is_dir():
                raise ValueError(
                    f"Task {name!r}: no copy of {hub_name} at {copy}; get it with: "
                    f"hf download {hub_name} --repo-type dataset --local-dir {copy}"
                )
            config = {**config, "dataset_path": str(copy), "dataset_kwargs": None}
        return config

    def check(self, tasks: Iterable[str]) -> list[str]:
        """The tasks' names in lmms-eval. Raises `ValueError` for unknown tasks and for missing data."""
        names = [ALIASES.get(task, task) for task in tasks]
        for task in names:
            if task not in self.task_index:
                raise unknown_task(task)
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"--tasks names {', '.join(sorted(repeated))} twice.")
        for name in names:
            for leaf in self.leaves(name):
                self.rows(leaf)
        return names

    def rows(self, name: str) -> list[SafetyRow] | None:
        """The rows of one of our tasks; `None` for lmms-eval's tasks."""
        config = self._get_config(name)
        if "class" not in config:
            return None
        settings = config["metadata"]
        return task_rows(self.data, name, **settings["rows"], labels=task_labels(settings))

    def leaves(self, name: str) -> Iterator[str]:
        """The single tasks of a task, group or tag."""
        entry = self.task_index[name]
        if entry["type"] in ("task", "python_task"):
            yield name
            return
        members = entry["task"] if entry["type"] == "tag" else super()._get_config(name)["task"]
        for member in members:
            yield from self.leaves(member if isinstance(member, str) else member["task"])
