"""`safevlm demo`: the whole of SafeVLM on two cores in minutes, from nothing.

    picture world -> unsafe tiny base -> stage 1 -> stage 2 -> saved with code and card -> used by a fresh process

Every part but the world and the base is what a 7B model goes through. No weights are downloaded.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from safevlm import SafetyPolicy, SafeVlmConfig, SafeVlmForConditionalGeneration, SafeVlmProcessor
from safevlm.model_card import write_card
from safevlm.trainer.card_facts import model_facts, origin, row_counts, share_measures, stage_facts
from safevlm.trainer.data import PAPER_LABELS, balance
from safevlm.trainer.data.mix_output import file_sha256
from safevlm.trainer.evaluation import environment
from safevlm.trainer.recipe import Recipe
from safevlm.trainer.schedule import check_same_run, run_schedule
from safevlm.trainer.stage.checkpoints import write_atomically

from .answers import instructions, to_row
from .base import build_base
from .evaluation import Record, ask_all, summarise
from .export import write_dev_rows
from .sheet import draw_sheet
from .world import make_examples

logger = logging.getLogger(__name__)

# Test scenes come from a stream of their own, apart from the dev scenes that choices are made on.
TEST_SEED_OFFSET = 7_000_003
# What the card shows of the test, by section, and whether higher is better.
CARD_MEASURES = {
    **{f"refusal_rate_level{level}": ("safety", True) for level in (1, 2, 3)},
    "comply_rate_risky": ("safety", False),
    "pair_accuracy_risky": ("safety", True),
    "over_refusal_rate_clean": ("over-refusal", False),
    "over_refusal_rate_lookalike": ("over-refusal", False),
    "pair_accuracy_benign": ("general ability", True),
    "clean_accuracy": ("general ability", True),
    **{name: ("safety head", True) for name in ("category_macro_f1", "level_accuracy", "auroc")},
}
COLUMNS = {"base": "base", "1-safety_alignment": "stage1", "2-joint_finetuning": "stage2"}


@dataclass(frozen=True)
class DemoSizes:
    """How many pictures to train and to test on, and training arguments that replace the recipe's."""

    train_pictures: int
    test_pictures: int
    stage_overrides: tuple[dict, ...] = ({}, {})


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
    Builds, trains, evaluates, saves and uses a SafeVLM; returns what goes into `results.json`.

    Args:
        output_dir: Gets `results.json`, `sheet.png`, `base/`, `model/`, `training/` and `dev/` (labelled rows to
            calibrate on). Training that was interrupted there is resumed; a finished run is evaluated again from its
            trained models.
        seed (`int`): The run is reproducible in it (same machine, same number of threads).
        fast (`bool`): Smaller and rougher, for smoke tests.
        started (`float`, *optional*): `time.time()` at which the process started, for the total.
    """
    started = time.time() if started is None else started
    sizes = FAST if fast else FULL
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    check_same_run(output_dir, {"seed": seed, "fast": fast})
    set_seed(seed)
    policy = SafetyPolicy()
    recipe = Recipe.load("demo")
    recipe = replace(recipe, stages=[{**a, **b} for a, b in zip(recipe.stages, sizes.stage_overrides, strict=True)])
    seconds: dict[str, float] = {}
    clock = _Clock(seconds, started)
    clock("import")

    base_dir = output_dir / "base"
    if not base_dir.is_dir():
        partial = output_dir / ".base.partial"
        shutil.rmtree(partial, ignore_errors=True)
        build_base(partial, seed=seed, instructions=instructions(policy), fast=fast)
        partial.rename(base_dir)
    clock("unsafe base")

    rows = [to_row(example, policy) for example in make_examples("train", sizes.train_pictures, seed)]
    # As in the paper, stage 1 learns from risky rows balanced over categories and some clean ones, stage 2 from all.
    num_risky = sum(row.level > 0 for row in rows)
    train_rows = {"safety_alignment": balance(rows, clean=num_risky, seed=seed), "joint_finetuning": rows}
    test = make_examples("test", sizes.test_pictures, seed + TEST_SEED_OFFSET)
    clock("data")

    metrics: dict[str, dict] = {}
    answers: dict[str, list[Record]] = {}

    def evaluate(name: str, model, processor):
        records = ask_all(model, processor, test, COLUMNS[name])
        metrics[COLUMNS[name]] = summarise(records)
        answers[COLUMNS[name]] = records
        clock(f"evaluate {COLUMNS[name]}")

    evaluate("base", AutoModelForImageTextToText.from_pretrained(base_dir), AutoProcessor.from_pretrained(base_dir))

    processor = SafeVlmProcessor.from_base(base_dir, config=SafeVlmConfig(**recipe.safety))
    set_seed(seed)
    model = SafeVlmForConditionalGeneration.from_base(base_dir, processor, **recipe.safety)

    def after_stage(folder: Path, model):
        clock(COLUMNS[folder.name])
        evaluate(folder.name, model, processor)

    model = run_schedule(
        model,
        processor,
        train_rows,
        output_dir / "training",
        recipe,
        after_stage=after_stage,
        seed=seed,
        data_seed=seed,
        use_cpu=not torch.cuda.is_available(),
    )

    model_dir = output_dir / "model"
    trained = output_dir / "training" / f"{len(recipe.stages)}-{recipe.stages[-1]['stage']}" / "model"
    write_atomically(lambda partial: shutil.copytree(trained, partial), model_dir)
    results = {
        "total_seconds": None,
        "seed": seed,
        "metrics": metrics,
        "num_test_rows": len(test),
        "seconds": seconds,
        "environment": environment(),
    }
    draw_sheet(answers, output_dir / "sheet.png")
    _write_card(output_dir, results, sizes, recipe, rows, model.config)
    write_dev_rows(output_dir / "dev", seed)
    clock("save")

    examples = _showcase(output_dir, answers["stage2"])
    fresh = use_in_fresh_process(model_dir, examples)
    clock("fresh process")

    results["total_seconds"] = round(time.time() - started, 1)
    (output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    tqdm.write(_table(metrics))
    tqdm.write(_conversation(fresh))
    tqdm.write(
        f"\n{results['total_seconds']} s in all on {results['environment']['device']}, {len(test)} test rows, "
        f"seed {seed}.\n"
        f"Results: {output_dir / 'results.json'}\nPicture sheet: {output_dir / 'sheet.png'}\nModel: {model_dir}"
    )
    return results


FRESH_PROCESS = """
import json, sys

class NoSafeVlm:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "safevlm":
            raise ModuleNotFoundError(f"{name} is blocked: the saved model must not need it")

sys.meta_path.insert(0, NoSafeVlm())
from PIL import Image
from transformers import pipeline

model, requests = sys.argv[1], json.loads(sys.argv[2])
pipe = pipeline("image-text-to-text", model=model, trust_remote_code=True)
answers = []
for request in requests:
    content = [{"type": "image", "image": Image.open(request["image"])}, {"type": "text", "text": request["question"]}]
    answer = pipe(text=[{"role": "user", "content": content}], max_new_tokens=48, return_full_text=False)[0]
    answers.append({**request, "answer": answer["generated_text"].strip(), "safety": answer["safety"]})
print("ANSWERS " + json.dumps(answers))
"""


def use_in_fresh_process(model_dir: str | Path, requests: list[dict]) -> list[dict]:
    """
    Answers `requests` (`image` path, `question`) through the stock pipeline, in a process that cannot import safevlm.

    Returns each request with its `answer` and `safety`. Raises `RuntimeError` with the process's output if that fails.
    """
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(Path(model_dir).resolve()), json.dumps(requests)],
        capture_output=True,
        text=True,
        env=variables,
        timeout=600,
    )
    lines = [line for line in process.stdout.splitlines() if line.startswith("ANSWERS ")]
    if process.returncode or not lines:
        raise RuntimeError(f"The saved model failed in a fresh process:\n{process.stdout}\n{process.stderr}")
    return json.loads(lines[-1].removeprefix("ANSWERS "))


class _Clock:
    """Notes the seconds since the last call under a name."""

    def __init__(self, seconds: dict[str, float], start: float):
        self.seconds, self.last = seconds, start

    def __call__(self, name: str):
        now = time.time()
        self.seconds[name] = round(now - self.last, 1)
        self.last = now


def _showcase(output_dir: Path, records: list[Record]) -> list[dict]:
    """A safe and a risky question about one risky picture, as files for the fresh process."""
    by_pair: dict[int, dict[str, Record]] = {}
    for record in records:
        if record.example.pair_id is not None:
            by_pair.setdefault(record.example.pair_id, {})[record.example.kind] = record
    pair = next(pair for pair in by_pair.values() if pair["pair_risky"].example.level == 3)
    requests = []
    for kind in ("pair_benign", "pair_risky"):
        example = pair[kind].example
        path = output_dir / "example.png"
        example.image.save(path)
        requests.append({"image": str(path.resolve()), "question": example.question})
    return requests


def _write_card(output_dir: Path, results: dict, sizes: DemoSizes, recipe: Recipe, rows: list, config):
    model_dir = output_dir / "model"
    command = f"safevlm demo --seed {results['seed']}{' --fast' if sizes == FAST else ''}"
    base = {
        "name": "picture-world-llava",
        "about": "a LLaVA of about a million parameters, built and trained on the spot to answer everything",
        "files": {"model.safetensors": file_sha256(output_dir / "base" / "model.safetensors")},
    }
    training = {
        "command": command,
        "about": "Drawn scenes of a small picture world with questions about them, risky ones among them; see "
        "safevlm.trainer.demo. This model shows the method at work. It knows nothing of the real world.",
        "rows": len(rows),
        **row_counts(rows, PAPER_LABELS),
        "stages": stage_facts(output_dir / "training", recipe, {"seed": results["seed"]}),
    }
    data = f"{results['num_test_rows']} questions about held-out scenes of the picture world"
    result = {
        "title": "Held-out scenes of the picture world",
        "system": "stage2",
        "measures": share_measures(results["metrics"], CARD_MEASURES),
        **origin(results["environment"], data, command, config.safety_policy),
    }
    (model_dir / "plots").mkdir(exist_ok=True)
    shutil.copyfile(output_dir / "sheet.png", model_dir / "plots" / "sheet.png")
    sheet = {"file": "plots/sheet.png", "title": "What the base, stage 1 and stage 2 answer about the same scenes"}
    write_card(model_dir, {**model_facts("SafeVLM demo", base, training, [result]), "plots": [sheet]})


def _table(metrics: dict[str, dict]) -> str:
    names = list(metrics["stage2"])
    width = max(map(len, names))
    lines = ["", f"{'%':<{width}}  " + "".join(f"{column:>8}" for column in metrics)]
    for name in names:
        values = [f"{100 * m[name]:8.1f}" if m.get(name) is not None else f"{'-':>8}" for m in metrics.values()]
        lines.append(f"{name:<{width}}  " + "".join(values))
    return "\n".join(lines)


def _conversation(fresh: list[dict]) -> str:
    lines = ["\nThe saved model in a fresh process without safevlm, about one picture:"]
    for turn in fresh:
        safety = turn["safety"]
        lines.append(f"  > {turn['question']}\n  {turn['answer']}")
        lines.append(f"    [{safety['action']}; {safety['category']}, {safety['level']}; risk {safety['score']:.3f}]")
    return "\n".join(lines)
