"""Which tasks `safevlm evaluate` has, and whether their data is there.

lmms-eval takes seconds to import. The checks here do without it, so that a wrong task name is reported at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import yaml

from safevlm.trainer.data import DataError

TASKS_FOLDER = Path(__file__).parent / "tasks"
HOW_TO_GET = "trainer/evaluation/README.md says how to get each data set and where it goes"

# Short names of tasks that lmms-eval has in several variants. MMBench: the variant that needs no OpenAI account.
ALIASES = {"mmbench": "mmbench_en_dev_static"}


def check_tasks(tasks: Iterable[str], data: Path):
    """
    Raises `ValueError` for a name that no task has, and `DataError` for a task of ours without its data under `data`.
    What only lmms-eval can know, `LocalTaskManager.check` finds out.

    Args:
        data (`Path`): The folder that `--data` names.
    """
    if not data.is_dir():
        raise ValueError(f"--data {str(data)!r} is not a folder.")
    for name in (ALIASES.get(task, task) for task in tasks):
        if (TASKS_FOLDER / f"{name}.yaml").is_file():
            for task, config in _our_tasks(name):
                task_files(data, task, config["metadata"]["rows"]["path"])
        elif not _may_be_of_lmms_eval(name):
            raise unknown_task(name)


def task_files(data: Path, task: str, path: str) -> list[Path]:
    """The data files of one of our tasks; raises `DataError` if there are none."""
    files = sorted(data.glob(path))
    if not files:
        raise DataError(f"Task {task!r}: no file {path!r} in the data folder {str(data)!r}; {HOW_TO_GET}.")
    return files


def unknown_task(name: str) -> ValueError:
    known = ", ".join(sorted(path.stem for path in TASKS_FOLDER.glob("*.yaml")))
    return ValueError(
        f"--tasks {name!r} is not a known task. Ours are {known}; lmms-eval's are listed by: lmms-eval tasks list"
    )


def _our_tasks(name: str) -> Iterator[tuple[str, dict]]:
    """Our task of that name, or the tasks of that group, with the contents of their files."""
    config = yaml.safe_load((TASKS_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    if "group" in config:
        for member in config["task"]:
            yield from _our_tasks(member)
    else:
        yield name, config


def _may_be_of_lmms_eval(name: str) -> bool:
    """Whether one of lmms-eval's files has that name or contains it: groups and tags have no files of their own."""
    package = find_spec("lmms_eval")
    if package is None:  # reported later, with what to install
        return True
    folder = Path(package.origin).parent / "tasks"
    if any(folder.rglob(f"{name}.yaml")):
        return True
    files = (path for path in folder.rglob("*") if path.suffix in ("", ".yaml") and path.is_file())
    return any(name in path.read_text(encoding="utf-8", errors="replace") for path in files)
