"""Models that commit 5c91370 saved load with today's code and give the verdicts and answers that they gave then.

What a mend had to change is listed in CHANGELOG.md and, with the reason, in `CHANGED` below.
"""

import json
from pathlib import Path

import pytest
from saved_models.make import CHATS, inputs_of

from safevlm import SafeVlmForConditionalGeneration, SafeVlmProcessor

FOLDER = Path(__file__).parent / "saved_models"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
# (model, chat, policy): why the answer is another today. Empty: nothing changed.
CHANGED: dict[tuple[str, str, str], str] = {}


@pytest.fixture(scope="module")
def processor():
    return SafeVlmProcessor.from_pretrained(FOLDER / "full")


@pytest.fixture(scope="module")
def models(processor):
    full = SafeVlmForConditionalGeneration.from_pretrained(FOLDER / "full")
    base = SafeVlmForConditionalGeneration.from_pretrained(FOLDER / "full").base
    return {
        "full": full,
        "adapter": SafeVlmForConditionalGeneration.from_base(base, processor, safety_adapter=FOLDER / "adapter"),
        "full_8bit": SafeVlmForConditionalGeneration.from_pretrained(FOLDER / "full_8bit"),
        "full_4bit": SafeVlmForConditionalGeneration.from_pretrained(FOLDER / "full_4bit"),
    }


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ["full", "adapter", "full_8bit", "full_4bit"])
def test_a_saved_model_gives_the_same_verdict(models, processor, name, chat):
    expected = EXPECTED[name if name in EXPECTED else "full"][chat]["verdict"]
    found = models[name].assess(**inputs_of(processor, *CHATS[chat])).to_list()[0]
    # Kernels of quantised layers differ between kinds of CPU.
    tolerance = 0.05 if "bit" in name else 1e-4
    for field in ("assessed", "action", "category", "level"):
        assert found[field] == expected[field]
    for field in ("score", "level_probabilities", "category_probabilities"):
        assert found[field] == (expected[field] and pytest.approx(expected[field], abs=tolerance))


@pytest.mark.parametrize("policy", ["default", "paper", "off"])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ["full", "adapter"])
def test_a_saved_model_gives_the_same_answer(models, processor, name, chat, policy):
    inputs = inputs_of(processor, *CHATS[chat])
    found = models[name].generate(**inputs, safety_policy=policy, max_new_tokens=80)
    answer = found[0, inputs["input_ids"].shape[1] :].tolist()
    assert (answer == EXPECTED["full"][chat]["answers"][policy]) != ((name, chat, policy) in CHANGED)


@pytest.mark.parametrize("name", ["full_8bit", "full_4bit"])
def test_a_saved_quantised_model_refuses_what_it_refused(models, processor, name):
    inputs = inputs_of(processor, *CHATS["risky"])
    found = models[name].generate(**inputs, max_new_tokens=80)
    assert found[0, inputs["input_ids"].shape[1] :].tolist() == EXPECTED[name]["risky"]["answers"]["default"]
