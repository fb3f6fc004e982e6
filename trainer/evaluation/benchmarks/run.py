"""Runs systems over tasks with lmms-eval, and keeps what a sceptic needs: answers, verdicts, settings and versions.

    OUTPUT/results.json            all metrics, with environment, seed and the exact command
    OUTPUT/comparison.md, .png     the table and the plot (`comparison.py`)
    OUTPUT/SYSTEM/settings.json    what the answers were made with; a run with other settings is refused
    OUTPUT/SYSTEM/answers.jsonl    the answer log: written batch by batch, read by a resumed run
    OUTPUT/SYSTEM/items/TASK.jsonl one line per item: prompt, answer, verdict, reference, metrics
    OUTPUT/SYSTEM/head/*.png       plots of the safety head, if labelled rows were assessed

The same command continues a run that was killed. All answers are made before a judge is asked.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from lmms_eval.evaluator import simple_evaluate
from loguru import logger
from transformers import AutoConfig

from safevlm import SafeVlmConfig
from safevlm.files import replace_json
from safevlm.trainer.evaluation.environment import environment, git_commit, versions
from safevlm.trainer.evaluation.judges.score_items import judge_records, make_judge
from safevlm.trainer.settings import check_settings

from .checkpoints import Checkpoints, fingerprint
from .comparison import write_comparison
from .items import item_facts, make_items, write_items
from .lmms_plugin import SafeVlmLmms
from .options import EvaluateOptions
from .safety_task import DATA_VARIABLE
from .systems import System
from .task_data import LocalTaskManager
from .task_rows import LABELS_VARIABLE
from .verdict_measures import measure_verdicts

Items = dict[str, list[dict]]
"""A system's items, as records, by task."""


def evaluate(systems: Sequence[System], options: EvaluateOptions) -> dict[str, Any]:
    """
    Evaluates every system on every task; returns what is written to `results.json`.

    Args:
        systems (`Sequence[System]`): See [`make_systems`].
    """
    options.check()
    os.environ[DATA_VARIABLE] = str(options.data.resolve())
    if (labels := _labels_of(systems)) is not None:
        os.environ[LABELS_VARIABLE] = labels
    with _quiet():
        manager = LocalTaskManager(options.data, options.tasks)
        names = manager.check(options.tasks)
        leaves = [leaf for name in names for leaf in manager.leaves(name)]  # lmms-eval's own order varies

    checkpoints = Checkpoints(options.device, options.dtype)
    results: dict[str, dict[str, Any]] = {}
    items: dict[str, Items] = {}
    for system in systems:
        start = time.time()
        metrics, items[system.name] = _answer(system, names, leaves, manager, checkpoints, options)
        results[system.name] = {
            "system": system.describe(),
            "model_policy": system.model_policy(),
            "metrics": metrics,
            "seconds": round(time.time() - start, 1),
        }
    checkpoints.clear()  # the judge may need the memory
    _judge(items, results, manager, options)
    for system in systems:
        _add_item_facts(results[system.name], system, items[system.name], manager, options)
    report = {
        "command": options.command,
        "environment": {**environment(), **versions(), "git_commit": git_commit()},
        "settings": {
            "data": str(options.data),
            "limit": options.limit,
            "seed": options.seed,
            "batch_size": options.batch_size,
            "judge": options.judge,
        },
        "tasks": names,
        "groups": {name: list(manager.leaves(name)) for name in names if name not in leaves},
        "systems": results,
    }
    replace_json(options.output / "results.json", report)
    write_comparison(report, options.output)
    return report


def _labels_of(systems: Sequence[System]) -> str | None:
    """The last SafeVLM among the systems: a user's own rows have its labels."""
    checkpoints = dict.fromkeys(system.checkpoint for system in reversed(systems))
    return next((c for c in checkpoints if AutoConfig.from_pretrained(c).model_type == SafeVlmConfig.model_type), None)


def _answer(
    system: System,
    names: Sequence[str],
    leaves: Sequence[str],
    manager: LocalTaskManager,
    checkpoints: Checkpoints,
    options: EvaluateOptions,
) -> tuple[dict[str, dict[str, float]], Items]:
    """Asks a system all that is not in its answer log; returns lmms-eval's metrics and the items, by task."""
    folder = options.output / system.name
    check_settings(
        folder / "settings.json",
        {
            **system.describe(),
            "fingerprint": fingerprint(system.checkpoint),
            **options.of_answers(),
            "versions": versions(),
        },
        f"{folder} holds answers made with other settings ({{changes}}). Repeat the command as it was, or use "
        f"another --output.",
    )
    lm = SafeVlmLmms(
        make_answerer=lambda: checkpoints.answerer(system),
        batch_size=options.batch_size,
        answers=folder / "answers.jsonl",
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
    )
    with _quiet():
        outcome = simple_evaluate(
            model=lm,
            tasks=list(names),
            task_manager=manager,
            limit=options.limit,
            bootstrap_iters=0,
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            torch_random_seed=options.seed,
            fewshot_random_seed=options.seed,
            process_docs_parallel=1,
            cli_args=Namespace(output_path=str(folder), process_with_media=False, reasoning_tags=None),
        )
    metrics = {task: _metrics(outcome["results"][task]) for task in leaves}
    return metrics, make_items({task: outcome["samples"][task] for task in leaves}, lm.log.records)


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """lmms-eval's `{"name,filter": value, "name_stderr,filter": ...}` as `{"name": value}`."""
    named = {key.split(",")[0]: value for key, value in values.items() if "," in key}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "_stderr" not in name
    }


def _judge(
    items: dict[str, Items], results: dict[str, dict], manager: LocalTaskManager, options: EvaluateOptions
) -> None:
    """Scores the answers to our tasks. Those to lmms-eval's have right answers and need no judge."""
    judge = make_judge(options.judge, options.output / "judge_verdicts.jsonl", options.device)
    if judge is None:
        return
    for task in dict.fromkeys(task for by_task in items.values() for task in by_task):
        rows = manager.rows(task)
        if rows is None:
            continue
        for name, by_task in items.items():
            counts = judge_records(judge, task, by_task[task], rows)
            scores = [r["metrics"]["judge_score"] for r in by_task[task] if "judge_score" in r["metrics"]]
            if scores:
                results[name]["metrics"][task]["judge_score"] = sum(scores) / len(scores)
            results[name].setdefault("judge_verdicts", {})[task] = counts


def _add_item_facts(
    result: dict[str, Any], system: System, items: Items, manager: LocalTaskManager, options: EvaluateOptions
) -> None:
    """Counts and breakdowns of a system's items, the measures of its verdicts, and the items' files."""
    folder = options.output / system.name
    result |= item_facts(items, result["metrics"])
    head = measure_verdicts(system, items, manager, folder / "head", options.seed)
    if head is not None:
        result["head"] = head
    for task, records in items.items():
        write_items(folder / "items" / f"{task}.jsonl", records)


@contextlib.contextmanager
def _quiet():
    """lmms-eval prints to stdout and logs each step: keeps stdout ours and shows only its warnings."""
    logger.remove()
    handler = logger.add(sys.stderr, level="WARNING")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.remove(handler)
