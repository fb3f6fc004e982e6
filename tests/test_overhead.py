"""The benchmark of what safety costs times the decoding steps themselves (tests/benchmarks/overhead.py)."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import encode

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import overhead


@pytest.mark.parametrize("side", ["base", "safe"])
def test_a_clock_notes_the_first_token_and_each_step_after_it(model, processor, side):
    inputs = encode(processor, ["What is in the picture?"], [1])
    if side == "base":
        inputs = {"input_ids": torch.arange(100, 130)[None]}
    clock = overhead.Clock(lambda: None)
    target = model.base if side == "base" else model
    options = {} if side == "base" else {"safety_policy": {"level_actions": {}, "risk_threshold": 1.0}}
    target.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, streamer=clock, **options)
    assert len(clock.times) == 7 and len(clock.steps()) == 5
    assert all(seconds > 0 for seconds in clock.steps())


def test_a_ratio_is_of_pairs_so_that_a_slow_moment_slows_both():
    base, factor = [1.0, 50.0, 2.0, 1.0, 9.0], 1.01
    assert overhead.ratio([seconds * factor for seconds in base], base) == pytest.approx(factor)
