"""The pipeline: the verdict beside the answer, a policy per call, answers without the template's white space."""

import pytest
from tiny import chat, picture
from transformers import pipeline

from safevlm import SafeVlmPipeline

REFUSAL = "I can't help with this request: it involves politics."


@pytest.fixture(scope="module")
def pipe(model, processor):
    return SafeVlmPipeline(model=model, processor=processor)


def messages():
    first = chat("hello")
    first[0]["content"][0]["image"] = picture()
    return first


@pytest.mark.parametrize(
    "policy",
    [dict(safety_policy="off"), dict(generate_kwargs={"safety_policy": "off"})],
    ids=["argument", "generation"],
)
def test_a_calls_policy_holds(pipe, model, verdicts, policy):
    verdicts(model, "high")
    (result,) = pipe(text=messages(), return_full_text=False, max_new_tokens=80)
    assert result["generated_text"] == REFUSAL and result["safety"]["action"] == "refuse"
    (result,) = pipe(text=messages(), return_full_text=False, max_new_tokens=80, **policy)
    assert REFUSAL not in result["generated_text"]
    assert result["safety"]["action"] == "off" and result["safety"]["assessed"] is False
    assert result["safety"].keys() == pipe(text=messages())[0]["safety"].keys()


def test_a_policy_given_twice_is_refused(pipe):
    with pytest.raises(ValueError, match="`safety_policy` is given twice"):
        pipe(text=messages(), safety_policy="off", generate_kwargs={"safety_policy": "strict"})


def test_the_stock_pipeline_does_not_ignore_a_policy(model, processor):
    stock = pipeline("image-text-to-text", model=model, processor=processor)
    with pytest.raises(ValueError, match="pipeline_class=safevlm.SafeVlmPipeline"):
        stock(text=messages(), safety_policy="strict")


def test_a_policy_that_does_not_exist_is_refused(pipe):
    with pytest.raises(ValueError, match="nonsense"):
        pipe(text=messages(), safety_policy="nonsense")


def test_an_answer_begins_without_white_space(pipe, model, verdicts):
    verdicts(model, "high")
    for chats in (messages(), [messages(), messages()]):
        for result in pipe(text=chats, max_new_tokens=80):
            result = result[0] if isinstance(result, list) else result
            assert result["generated_text"][-1] == {"role": "assistant", "content": REFUSAL}
    (result,) = pipe(text=messages(), return_full_text=False, max_new_tokens=80)
    assert result["generated_text"] == REFUSAL


def test_what_continues_an_answer_keeps_its_space(pipe, model, verdicts):
    verdicts(model, "high")
    begun = [*messages(), {"role": "assistant", "content": [{"type": "text", "text": "Sure"}]}]
    (result,) = pipe(text=begun, max_new_tokens=80)
    assert result["generated_text"][-1]["content"][-1]["text"] == f"Sure {REFUSAL}"
