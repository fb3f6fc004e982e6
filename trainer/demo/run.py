"""`safevlm demo`: the whole of SafeVLM from nothing, in minutes on two cores.

    picture world -> unsafe tiny base -> stage 1 -> stage 2 -> saved with code and card -> used in a fresh process

Apart from the picture world and the base, everything is what a 7B model goes through. No weights are downloaded.
"""

import shutil
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import set_seed

from safevlm import SafetyPolicy, SafeVlmConfig, SafeVlmForConditionalGeneration, SafeVlmProcessor
from safevlm.files import replace_folder, replace_json
from safevlm.trainer.asking import verdict_line
from safevlm.trainer.data import SafetyRow, balance
from safevlm.trainer.evaluation import environment
from safevlm.trainer.loading import load_checkpoint
from safevlm.trainer.recipe import Recipe, StageFolder
from safevlm.trainer.schedule import check_same_run, run_schedule

from .answers import instructions, to_row
from .base.build import build_base
from .card import write_demo_card
from .evaluation import Record, ask_all, summarise
from .export import write_dev_rows
from .fresh_process import pair_requests, use_in_fresh_process
from .picture_world.examples import Example, make_examples
from .sheet import draw_sheet

# Test scenes come from a random stream of their own, apart from the dev scenes that choices are made on.
TEST_SEED_OFFSET = 7_000_003


@dataclass(frozen=True)
class DemoSizes:
    """
    Args:
        train_pictures, test_pictures (`int`)
        stage_overrides (`tuple[dict, ...]`): For each stage, training arguments that replace the recipe's.
    """

    train_pictures: int
    test_pictures: int
    stage_overrides: tuple[dict, ...] = ({}, {})

    def recipe(self) -> Recipe:
        recipe = Recipe.load("demo")
        stages = zip(recipe.stages, self.stage_overrides, strict=True)
        return replace(recipe, stages=[{**stage, **overrides} for stage, overrides in stages])


FULL = DemoSizes(train_pictures=8_000, test_pictures=1_400)
FAST = DemoSizes(
    train_pictures=1_500,
    test_pictures=400,
    stage_overrides=(
        {"max_steps": 60, "warmup_steps": 5, "per_device_train_batch_size": 32},
        {"max_steps": 30, "warmup_steps": 5, "per_device_train_batch_size": 32},
    ),
)


def run_demo(output_dir: str | Path, seed: int = 0, fast: bool = False, started: float | None = None) -> dict:
    """
    Builds, trains, evaluates, saves and uses a SafeVLM; returns the content of `results.json`.

    Args:
        output_dir: Gets `results.json`, `sheet.png`, `base/`, `model/`, `training/` and `dev/` (labelled rows to
            calibrate on). A training that was interrupted is resumed. A finished run is evaluated again with its
            trained models.
        seed (`int`): The run is reproducible in it (same machine, same number of threads).
        fast (`bool`): Smaller and rougher, for smoke tests.
        started (`float`, *optional*): `time.time()` when the process started, for the total time.
    """
    clock = _Clock(time.time() if started is None else started)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    check_same_run(output_dir, {"seed": seed, "fast": fast})
    set_seed(seed)
    sizes = FAST if fast else FULL
    recipe, policy = sizes.recipe(), SafetyPolicy()
    clock("import")

    base_dir = output_dir / "base"
    if not base_dir.is_dir():
        replace_folder(partial(build_base, seed=seed, instructions=instructions(policy), fast=fast), base_dir)
    clock("unsafe base")

    rows = [to_row(example, policy) for example in make_examples("train", sizes.train_pictures, seed)]
    evaluation = _Evaluation(make_examples("test", sizes.test_pictures, seed + TEST_SEED_OFFSET), clock)
    clock("data")

    evaluation.add("base", *load_checkpoint(str(base_dir)))
    model = _train(base_dir, rows, output_dir / "training", recipe, seed, evaluation)
    replace_folder(partial(shutil.copytree, output_dir / "training" / "model"), output_dir / "model")
    draw_sheet(evaluation.records, output_dir / "sheet.png")
    results = {
        "total_seconds": None,
        "seed": seed,
        "metrics": evaluation.metrics,
        "num_test_rows": len(evaluation.examples),
        "seconds": clock.seconds,
        "environment": environment(),
    }
    write_demo_card(output_dir, results, recipe, rows, model.config.safety_policy, fast)
    write_dev_rows(output_dir / "dev", seed)
    clock("save")

    requests = pair_requests(evaluation.records["stage2"], output_dir / "example.png")
    answered = use_in_fresh_process(output_dir / "model", requests)
    clock("fresh process")

    results["total_seconds"] = clock.total
    replace_json(output_dir / "results.json", results, ensure_ascii=True)
    tqdm.write(_summary(results, answered, output_dir))
    return results


class _Clock:
    """
    Records the seconds since the last call under a name.

    Args:
        started (`float`): `time.time()` at the start.
    """

    def __init__(self, started: float):
        self.seconds: dict[str, float] = {}
        self.started = self.last = started

    def __call__(self, name: str):
        now = time.time()
        self.seconds[name] = round(now - self.last, 1)
        self.last = now

    @property
    def total(self) -> float:
        return round(time.time() - self.started, 1)


class _Evaluation:
    """Asks models the test questions, and keeps records and measures by the models' names."""

    def __init__(self, examples: list[Example], clock: _Clock):
        self.examples, self.clock = examples, clock
        self.records: dict[str, list[Record]] = {}
        self.metrics: dict[str, dict[str, float]] = {}

    def add(self, name: str, model, processor):
        self.records[name] = ask_all(model, processor, self.examples, name)
        self.metrics[name] = summarise(self.records[name])
        self.clock(f"evaluate {name}")


def _train(base_dir: Path, rows: list[SafetyRow], folder: Path, recipe: Recipe, seed: int, evaluation: _Evaluation):
    """A SafeVLM of the base, trained in both stages in `folder` and evaluated after each."""
    # As in the paper, stage 1 learns from risky rows balanced over categories and some clean ones, stage 2 from all.
    num_risky = sum(row.level > 0 for row in rows)
    train_rows = {"safety_alignment": balance(rows, clean=num_risky, seed=seed), "joint_finetuning": rows}
    processor = SafeVlmProcessor.from_base(base_dir, config=SafeVlmConfig(**recipe.safety))
    set_seed(seed)
    model = SafeVlmForConditionalGeneration.from_base(base_dir, processor, **recipe.safety)

    def after_stage(stage_folder: StageFolder, model):
        name = f"stage{stage_folder.number}"
        evaluation.clock(name)
        evaluation.add(name, model, processor)

    recipe = recipe.with_arguments(seed=seed, data_seed=seed, use_cpu=not torch.cuda.is_available())
    return run_schedule(model, processor, train_rows, folder, recipe, after_stage=after_stage)


def _summary(results: dict, answered: list[dict], output_dir: Path) -> str:
    lines = [
        _table(results["metrics"]),
        "\nThe saved model in a fresh process without safevlm, about one picture:",
    ]
    for turn in answered:
        lines.append(f"  > {turn['question']}\n  {turn['answer']}\n    [{verdict_line(turn['safety'])}]")
    lines.append(
        f"\n{results['total_seconds']} s in all on {results['environment']['device']}, "
        f"{results['num_test_rows']} test rows, seed {results['seed']}.\n"
        f"Results: {output_dir / 'results.json'}\nPicture sheet: {output_dir / 'sheet.png'}\n"
        f"Model: {output_dir / 'model'}"
    )
    return "\n".join(lines)


def _table(metrics: dict[str, dict]) -> str:
    names = list(metrics["stage2"])
    width = max(map(len, names))
    lines = ["", f"{'%':<{width}}  " + "".join(f"{column:>8}" for column in metrics)]
    for name in names:
        values = [f"{100 * m[name]:8.1f}" if m.get(name) is not None else f"{'-':>8}" for m in metrics.values()]
        lines.append(f"{name:<{width}}  " + "".join(values))
    return "\n".join(lines)
