"""Records facts for the model card during training: steps, time, device, losses, and CO2 if it is measured."""

import csv
import json
import math
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from safevlm.files import replace_json
from safevlm.trainer.evaluation.environment import environment

MEASURED = "measured.json"


class CardCallback(TrainerCallback):
    """
    Writes `measured.json` to the stage's folder with each checkpoint and at the end of training.

    An interrupted stage's time is the sum of its runs, each up to its last checkpoint.
    """

    def __init__(self):
        self.seconds_before = self.started = 0.0
        self.facts: dict = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        measured_before = read_measured(args.output_dir) if state.global_step else {}
        self.seconds_before, self.started = measured_before.get("seconds", 0.0), time.monotonic()
        self.facts = {
            **environment(),
            "processes": args.world_size,
            "rows_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "parameters": sum(_size(parameter) for parameter in model.parameters()),
            "trainable_parameters": sum(_size(p) for p in model.parameters() if p.requires_grad),
        }

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and math.isfinite(logs.get("loss", math.nan)):
            self.facts["loss"] = logs["loss"]

    def on_save(self, args, state, control, **kwargs):
        self._write(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            self.facts["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
        # codecarbon's callback, if used, runs before this one and has written its file.
        self.facts |= _emissions(Path(args.output_dir) / "emissions.csv")
        self._write(args, state)

    def _write(self, args, state):
        if not state.is_world_process_zero:
            return
        seconds = self.seconds_before + time.monotonic() - self.started
        facts = {**self.facts, "steps": state.global_step, "epochs": state.epoch or 0.0, "seconds": round(seconds, 1)}
        replace_json(Path(args.output_dir) / MEASURED, facts, ensure_ascii=True)


def read_measured(stage_folder) -> dict:
    """The facts that the callback wrote; empty for a stage trained without it."""
    path = Path(stage_folder) / MEASURED
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _size(parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # DeepSpeed empties parameters that it shards


def _emissions(path: Path) -> dict[str, float]:
    """Kilograms of CO2 equivalent and kWh, summed over the runs in codecarbon's file."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    return {
        "co2_kg": sum(float(run["emissions"]) for run in runs),
        "energy_kwh": sum(float(run["energy_consumed"]) for run in runs),
    }
