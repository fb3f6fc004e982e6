"""The benchmark of the safety path's cost (tests/benchmarks/overhead.py) times single decoding steps."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import encode

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import overhead

POLICY = {"level_actions": {"none": "allow"}, "risk_threshold": 1.0}


def test_base_and_safe_model_write_a_token_in_turns_and_each_is_timed(model, processor):
    inputs = encode(processor, ["What is in the picture?"], [1])
    text, order = {"input_ids": torch.arange(100, 130)[None]}, []
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)

    def generate(name, target, **arguments):
        def run(streamer):
            put = streamer.put
            streamer.put = lambda value: (order.append(name), put(value))
            target.generate(**arguments, **options, streamer=streamer)

        return run

    clocks = overhead.in_turns(
        lambda: None, generate("base", model.base, **text), generate("safe", model, **inputs, safety_policy=POLICY)
    )
    assert order == ["base", "safe"] * 7  # the prompt and six tokens
    for clock in clocks:
        assert len(clock.further_tokens) == 5 and all(seconds > 0 for seconds in clock.seconds)
        assert clock.first_token == sum(clock.seconds[:2])


def test_a_call_that_fails_does_not_stop_the_other(model):
    def fails(streamer):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        overhead.in_turns(lambda: None, fails, lambda streamer: [streamer.put(None) for _ in range(5)])


def test_a_ratio_is_of_pairs_so_that_a_slow_moment_slows_both():
    base, factor = [1.0, 50.0, 2.0, 1.0, 9.0], 1.01
    assert overhead.ratio([seconds * factor for seconds in base], base) == pytest.approx(factor)
