"""Which tasks `safevlm evaluate` has.

The list stands here, since importing the package `evaluation` takes seconds: what is
wrong with a list of tasks is told at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import yaml

from safevlm.trainer.data import DataError

TASKS_FOLDER = Path(__file__).parent / "evaluation" / "benchmarks" / "tasks"
HOW_TO_GET = "trainer/evaluation/README.md says how to get each data set and where it goes"

# Names in use for tasks that lmms-eval has in several variants. MMBench: the one that needs no OpenAI account.
ALIASES = {"mmbench": "mmbench_en_dev_static"}


def check_tasks(tasks: Iterable[str], data: Path):
    """
    Raises `ValueError` for a name that no task has, and for a task of ours whose data is not under `data`. What only
    lmms-eval can know, `LocalTaskManager.check` finds out.

    Args:
        data (`Path`): What `--data` names.
    """
    if not data.is_dir():
        raise ValueError(f"--data {str(data)!r} is not a folder.")
    for name in (ALIASES.get(task, task) for task in tasks):
        if not (TASKS_FOLDER / f"{name}.yaml").is_file():
            if not _may_be_of_lmms_eval(name):
                raise unknown_task(name)
            continue
        for task, config in _own(name):
            task_files(data, task, config["metadata"]["rows"]["path"])


def task_files(data: Path, task: str, path: str) -> list[Path]:
    """The data files of a task of ours; raises `DataError` if there is none."""
    files = sorted(data.glob(path))
    if not files:
        raise DataError(f"Task {task!r}: no file {path!r} in the data folder {str(data)!r}; {HOW_TO_GET}.")
    return files


def unknown_task(name: str) -> ValueError:
    known = ", ".join(sorted(path.stem for path in TASKS_FOLDER.glob("*.yaml")))
    return ValueError(
        f"--tasks {name!r} is no task. Ours are {known}; lmms-eval's are listed by: lmms-eval tasks list"
    )


def _own(name: str) -> Iterator[tuple[str, dict]]:
    """Our single tasks of that name, or in that group, and what their files say."""
    config = yaml.safe_load((TASKS_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    if "group" not in config:
        yield name, config
    for member in config["task"] if "group" in config else ():
        yield from _own(member)


def _may_be_of_lmms_eval(name: str) -> bool:
    """Whether a file of its tasks has the name, or says it: groups and tags have no file of theirs."""
    found = find_spec("lmms_eval")
    if found is None:  # told later, with what to install
        return True
    folder = Path(found.origin).parent / "tasks"
    if any(folder.rglob(f"{name}.yaml")):
        return True
    files = (path for path in folder.rglob("*") if path.suffix in ("", ".yaml") and path.is_file())
    return any(name in path.read_text(encoding="utf-8", errors="replace") for path in files)
