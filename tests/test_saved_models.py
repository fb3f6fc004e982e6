"""Models that commit 5c91370 saved load with today's code and give the same verdicts and answers as then.

If a bug fix has to change an answer, it is listed in CHANGELOG.md and, with the reason, in `CHANGED` below.
"""

import json
from pathlib import Path

import pytest
from cpus import CPUS, pretend_cpu
from saved_models.make import CHATS, inputs_of

from safevlm import SafeVlmForConditionalGeneration, SafeVlmProcessor

FOLDER = Path(__file__).parent / "saved_models"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
# (model, chat, policy): why the answer differs today. Empty: no answer changed.
CHANGED: dict[tuple[str, str, str], str] = {}


@pytest.fixture(scope="module")
def processor():
    return SafeVlmProcessor.from_pretrained(FOLDER / "full")


QUANTIZED = ["full_8bit", *(f"full_4bit {cpu}" for cpu in CPUS)]


@pytest.fixture(scope="module")
def models(processor):
    full = SafeVlmForConditionalGeneration.from_pretrained(FOLDER / "full")
    base = SafeVlmForConditionalGeneration.from_pretrained(FOLDER / "full").base
    models = {
        "full": full,
        "adapter": SafeVlmForConditionalGeneration.from_base(base, processor, safety_adapter=FOLDER / "adapter"),
        "full_8bit": SafeVlmForConditionalGeneration.from_pretrained(FOLDER / "full_8bit"),
    }
    with pytest.MonkeyPatch.context() as monkeypatch:
        for cpu in CPUS:
            pretend_cpu(monkeypatch, cpu)
            models[f"full_4bit {cpu}"] = SafeVlmForConditionalGeneration.from_pretrained(FOLDER / "full_4bit")
        yield models


def expected_of(name: str) -> dict:
    return EXPECTED.get(name.split(" ")[0], EXPECTED["full"])


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ["full", "adapter", *QUANTIZED])
def test_a_saved_model_gives_the_same_verdict(models, processor, name, chat):
    expected = expected_of(name)[chat]["verdict"]
    verdict = models[name].assess(**inputs_of(processor, *CHATS[chat])).to_list()[0]
    # The kernels of quantised layers differ between kinds of CPU.
    tolerance = 0.05 if "bit" in name else 1e-4
    for field in ("assessed", "action", "category", "level"):
        assert verdict[field] == expected[field]
    for field in ("score", "level_probabilities", "category_probabilities"):
        assert verdict[field] == (expected[field] and pytest.approx(expected[field], abs=tolerance))


@pytest.mark.parametrize("policy", ["default", "paper", "off"])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ["full", "adapter"])
def test_a_saved_model_gives_the_same_answer(models, processor, name, chat, policy):
    inputs = inputs_of(processor, *CHATS[chat])
    sequences = models[name].generate(**inputs, safety_policy=policy, max_new_tokens=80)
    answer = sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert (answer == EXPECTED["full"][chat]["answers"][policy]) != ((name, chat, policy) in CHANGED)


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_saved_quantised_model_refuses_what_it_refused(models, processor, name):
    inputs = inputs_of(processor, *CHATS["risky"])
    sequences = models[name].generate(**inputs, max_new_tokens=80)
    assert sequences[0, inputs["input_ids"].shape[1] :].tolist() == expected_of(name)["risky"]["answers"]["default"]
