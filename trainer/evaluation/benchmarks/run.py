"""Runs systems over tasks with lmms-eval and keeps what a sceptic needs: answers, verdicts, settings, versions.

    OUTPUT/results.json            all metrics, with environment, seed and the exact command
    OUTPUT/comparison.md, .png     the table and the plot (see `comparison.py`)
    OUTPUT/SYSTEM/settings.json    what the answers were made with; a run with other settings is refused
    OUTPUT/SYSTEM/answers.jsonl    the answer log: written batch by batch, read by a resumed run
    OUTPUT/SYSTEM/items/TASK.jsonl one line per item: prompt, answer, verdict, reference, metrics
    OUTPUT/SYSTEM/head/*.png       plots of the safety head, where labelled rows were assessed

A run that was killed is continued by the same command. All answers are made before any judge is asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safevlm import SafeVlmConfig
from safevlm.files import replace_text
from safevlm.safety_policy import SafetyPolicy
from safevlm.trainer.evaluation.environment import environment
from safevlm.trainer.settings import check_settings

from .answering import Answerer, load_checkpoint
from .guard_models import load_guard
from .items import item_facts, make_items, write_items
from .systems import System


def evaluate(
    systems: Sequence[System],
    tasks: Sequence[str],
    data: str | os.PathLike,
    output: str | os.PathLike,
    limit: int | None = None,
    judge: str = "rules",
    seed: int = 0,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    command: str = "",
) -> dict[str, Any]:
    """
    Evaluates every system on every task; returns what is written to `output/results.json`.

    Args:
        tasks: Names of our tasks, of lmms-eval's, or of groups.
        data: Folder of local copies (see the README beside this file).
        limit (`int`, *optional*): Only the first so many items of each task.
        judge (`str`): `"rules"`, `"openai:MODEL"` or `"hf:ID"` (see [`make_judge`]).
        max_new_tokens (`int`, *optional*): Cap on the tasks' own.
        command (`str`): What the user typed, noted in the results.
    """
    _require_lmms_eval()
    from safevlm.trainer.evaluation.judges.score_items import make_judge

    from .comparison import write_comparison
    from .safety_task import DATA_VARIABLE
    from .task_data import LocalTaskManager
    from .task_rows import LABELS_VARIABLE

    output, data = Path(output), Path(data)
    if not data.is_dir():
        raise ValueError(f"--data {str(data)!r} is not a folder.")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be 1 or more, got {limit}.")
    if limit is not None and limit % 2 and "mme" in tasks:
        raise ValueError(f"--limit {limit}: MME scores its questions in pairs; use an even limit.")
    os.environ[DATA_VARIABLE] = str(data.resolve())
    if (labels := _safe_checkpoint(systems)) is not None:
        os.environ[LABELS_VARIABLE] = labels
    with _quiet():
        manager = LocalTaskManager(data, tasks)
        names = manager.check(tasks)
        leaves = [leaf for name in names for leaf in manager.leaves(name)]  # lmms-eval's own order is not fixed

    models = _Checkpoints(device, dtype)
    results: dict[str, Any] = {}
    items: dict[str, dict[str, list[dict]]] = {}
    for system in systems:
        folder = output / system.name
        check_settings(
            folder / "settings.json",
            {
                **system.describe(),
                "fingerprint": fingerprint(system.checkpoint),
                "data": str(data.resolve()),
                "limit": limit,
                "seed": seed,
                "batch_size": batch_size,
                "max_new_tokens": max_new_tokens,
                "dtype": dtype,
                "versions": _versions(),
            },
            f"{folder} holds answers made with other settings ({{changes}}). Repeat the command as it was, or use "
            f"another --output.",
        )
        start = time.time()
        outcome, answers = _run(system, names, manager, models, folder, limit, seed, batch_size, max_new_tokens)
        items[system.name] = make_items({task: outcome["samples"][task] for task in leaves}, answers)
        results[system.name] = {
            "system": system.describe(),
            "model_policy": system.model_policy(),
            "metrics": {task: _metrics(outcome["results"][task]) for task in leaves},
            "seconds": round(time.time() - start, 1),
        }
    models.clear()  # the judge may need the room
    _judge(make_judge(judge, output / "judge_verdicts.jsonl", device), items, results, manager)
    for system in systems:
        name, by_task = system.name, items[system.name]
        results[name] |= item_facts(by_task, results[name]["metrics"])
        if (head := _head(system, by_task, manager, output / name / "head", seed)) is not None:
            results[name]["head"] = head
        for task, records in by_task.items():
            write_items(output / name / "items" / f"{task}.jsonl", records)
    report = {
        "command": command,
        "environment": {**environment(), **_versions(), "git_commit": _git_commit()},
        "settings": {"data": str(data), "limit": limit, "seed": seed, "batch_size": batch_size, "judge": judge},
        "tasks": names,
        "groups": {name: list(manager.leaves(name)) for name in names if name not in leaves},
        "systems": results,
    }
    replace_text(output / "results.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_comparison(report, output)
    return report


def _safe_checkpoint(systems: Sequence[System]) -> str | None:
    """A SafeVLM among what is compared: its labels are those of the user's own rows."""
    from transformers import AutoConfig

    checkpoints = {system.checkpoint: None for system in reversed(systems)}
    return next((c for c in checkpoints if AutoConfig.from_pretrained(c).model_type == SafeVlmConfig.model_type), None)


def _run(system, names, manager, models, folder, limit, seed, batch_size, max_new_tokens):
    """lmms-eval's results of one system, and its answer log's records."""
    from lmms_eval.evaluator import simple_evaluate

    from .lmms_plugin import SafeVlmLmms

    lm = SafeVlmLmms(
        make_answerer=lambda: models.answerer(system),
        batch_size=batch_size,
        answers=folder / "answers.jsonl",
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    with _quiet():
        outcome = simple_evaluate(
            model=lm,
            tasks=list(names),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            process_docs_parallel=1,
            cli_args=Namespace(output_path=str(folder), process_with_media=False, reasoning_tags=None),
        )
    return outcome, lm.log.records


def _judge(judge, items: dict, results: dict, manager):
    """Scores the answers to our tasks; lmms-eval's have right answers and need no judge."""
    if judge is None:
        return
    from safevlm.trainer.evaluation.judges.score_items import judge_records

    for task in {task: None for by_task in items.values() for task in by_task}:
        rows = manager.rows(task)
        for name, by_task in items.items() if rows is not None else ():
            counts = judge_records(judge, task, by_task[task], rows)
            scores = [r["metrics"]["judge_score"] for r in by_task[task] if "judge_score" in r["metrics"]]
            if scores:
                results[name]["metrics"][task]["judge_score"] = sum(scores) / len(scores)
            results[name].setdefault("judge_verdicts", {})[task] = counts


class _Checkpoints:
    """Keeps the model and the guard in use, so that systems that follow each other share them."""

    def __init__(self, device, dtype):
        self.device, self.dtype = device, dtype
        self.clear()

    def clear(self):
        self.loaded: dict[str, Any] = {}
        with contextlib.suppress(ImportError):
            import torch

            torch.cuda.empty_cache()

    def answerer(self, system: System) -> Answerer:
        for kind, wanted in (("model", system.checkpoint), ("guard", system.guard)):
            if self.loaded.get(kind, (None,))[0] != wanted:
                self.loaded.pop(kind, None)
        if "model" not in self.loaded:
            self.loaded["model"] = (system.checkpoint, load_checkpoint(system.checkpoint, self.device, self.dtype))
        model, processor = self.loaded["model"][1]
        if system.guard is not None and "guard" not in self.loaded:
            self.loaded["guard"] = (system.guard, load_guard(system.guard, model.device, self.dtype))
        guard = self.loaded["guard"][1] if system.guard is not None else None
        return Answerer(model, processor, system.policy, system.prefix, guard)


_NOT_THE_MODEL = ("card_facts.json",)  # refreshing a model's card does not change its answers


def fingerprint(checkpoint: str) -> str:
    """Changes when the checkpoint's files do: names, sizes and times of a folder, the commit of a Hub id."""
    from transformers import AutoConfig

    folder = Path(checkpoint)
    if not folder.is_dir():
        return str(AutoConfig.from_pretrained(checkpoint)._commit_hash)
    facts = sorted(
        (str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.suffix in (".json", ".safetensors", ".jinja", ".txt") and path.name not in _NOT_THE_MODEL
    )
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _head(system: System, by_task: dict[str, list[dict]], manager, folder: Path, seed: int) -> dict | None:
    """The safety head's report and plots on the labelled rows of our tasks; `None` where none has a verdict."""
    from transformers import AutoConfig

    from safevlm.trainer.evaluation.head.plots import plot_head_report
    from safevlm.trainer.evaluation.head.report import head_report

    from .scoring import head_predictions

    config = AutoConfig.from_pretrained(system.checkpoint)
    if config.model_type != SafeVlmConfig.model_type:
        return None
    labels, predictions = config.labels, []
    for task, records in by_task.items():
        rows = manager.rows(task)
        predictions += [] if rows is None else head_predictions(records, rows, labels)
    if not any(None not in (prediction.level, prediction.category) for prediction in predictions):
        return None
    policy = SafetyPolicy.from_value(config.safety_policy if system.policy is None else system.policy)
    policy = policy.for_labels(labels).replace(
        level_temperature=1.0, category_temperature=1.0
    )  # the verdicts' are calibrated already
    plot_head_report(predictions, policy, labels, folder)
    return head_report(predictions, policy, labels, seed=seed)


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """lmms-eval's `{"name,filter": value, "name_stderr,filter": ...}` as `{"name": value}`."""
    named = {key.split(",")[0]: value for key, value in values.items() if "," in key}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "_stderr" not in name
    }


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {
        "safevlm": version("safevlm"),
        "lmms_eval": version("lmms-eval"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _git_commit() -> str | None:
    """The commit of the safevlm source tree, marked where files differ from it; `None` for an installed wheel."""
    import subprocess

    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + (" with changes" if changes.stdout.strip() else "")


@contextlib.contextmanager
def _quiet():
    """lmms-eval prints to stdout and logs each step: stdout stays ours, and only its warnings are shown."""
    from loguru import logger

    logger.remove()
    handler = logger.add(sys.stderr, level="WARNING")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.remove(handler)


def _require_lmms_eval():
    try:
        import lmms_eval  # noqa: F401
    except ImportError as error:
        raise ImportError("`safevlm evaluate` runs on lmms-eval: pip install 'safevlm[eval]'.") from error
