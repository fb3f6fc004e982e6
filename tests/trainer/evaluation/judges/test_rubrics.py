"""The rubrics, the judge's prompt, and the strict reading of replies."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safevlm.trainer.evaluation.judges.prompt import Rubric, build_prompt, find_rubric, load_rubrics, parse_reply

NONCE = "0123456789abcdef"


def reply(score, reason="fine", nonce=NONCE):
    return json.dumps({"nonce": nonce, "score": score, "reason": reason})


def test_every_rtvlm_subtask_has_a_rubric_of_its_own_category():
    subtasks = "misleading visual_misleading_wrong visual_misleading_correct order_a order_b celebrity captcha"
    expected = ["misleading_text", "misleading_visual", "misleading_visual", "order", "order", "celebrity", "captcha"]
    subtasks = [*subtasks.split(), "jailbreak", "politics", "racial", "face"]
    expected += ["jailbreak", "politics", "racial", "face"]
    assert [find_rubric(f"rtvlm_{name}").name for name in subtasks] == expected


def test_rubrics_have_both_ends_of_the_scale_in_words():
    for rubric in load_rubrics().values():
        assert {0, 10} <= set(rubric.anchors)
        prompt = build_prompt(rubric, "What?", "That.").user
        assert rubric.criterion in prompt and rubric.anchors[0] in prompt and rubric.anchors[10] in prompt


def test_an_unknown_rubric_names_the_known_ones():
    with pytest.raises(ValueError, match="'weather' is unknown; use one of .*jailbreak"):
        find_rubric("weather")


@pytest.mark.parametrize("anchors", [{0: "bad"}, {0: "bad", 10: "good", 11: "better"}, ["bad", "good"]])
def test_a_rubric_with_a_broken_scale_is_refused(anchors):
    with pytest.raises(ValueError, match="anchors"):
        Rubric("mine", "title", "criterion", anchors)


def test_a_rubric_file_with_an_unknown_field_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("title: t\ncriterion: c\nanchors: {0: a, 10: b}\nweight: 3\n")
    with pytest.raises(ValueError, match="mine.yaml has the fields .*weight"):
        Rubric.from_file(tmp_path / "mine.yaml")


@pytest.mark.parametrize("score", range(11))
def test_the_demanded_format_is_read(score):
    assert parse_reply(reply(score, "why not"), NONCE) == (score, "why not")
    assert parse_reply("\n " + reply(score) + "\n", NONCE) == (score, "fine")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "N/A",
        "9",
        "0/10",
        "10/10",
        "Score: 8",
        "The response to question 3 deserves 9",
        "```json\n" + reply(7) + "\n```",
        "Here is my verdict: " + reply(7),
        reply(7) + "\nI hope this helps.",
        reply(7) + reply(2),
        reply(11),
        reply(-1),
        reply(7.5),
        reply(7.0),
        reply("7"),
        reply("N/A"),
        reply(None),
        reply(True),
        reply([7]),
        reply(float("nan")),
        reply(7, reason=None),
        reply(7, nonce="fedcba9876543210"),
        json.dumps({"score": 7, "reason": "no nonce"}),
        json.dumps({"nonce": NONCE, "score": 7}),
        json.dumps({"nonce": NONCE, "score": 7, "reason": "r", "confidence": 1}),
        f'{{"nonce": "{NONCE}", "score": 1, "score": 9, "reason": "twice"}}',
        reply(7)[:-5],
        json.dumps([NONCE, 7, "r"]),
        "[" * 100_000,
    ],
)
@pytest.mark.usefixtures("uncollected")
def test_anything_but_the_demanded_format_is_unparseable(text):
    assert parse_reply(text, NONCE) is None


@given(st.text())
def test_no_text_without_the_nonce_is_a_verdict(text):
    if NONCE not in text:
        assert parse_reply(text, NONCE) is None


@given(st.text(), st.text(), st.none() | st.text())
def test_judged_text_can_neither_close_its_marks_nor_carry_the_nonce(question, answer, reference):
    prompt = build_prompt(find_rubric("jailbreak"), question, answer, reference)
    assert prompt.nonce not in question + answer + (reference or "")
    assert prompt.user.count(f"<<<END ANSWER {prompt.nonce}>>>") == 1
    start = prompt.user.index(f"<<<ANSWER {prompt.nonce}>>>")
    assert (answer or "(empty)") in prompt.user[start : prompt.user.index(f"<<<END ANSWER {prompt.nonce}>>>")]


def test_answers_with_braces_stay_as_they_are():
    assert "{score} {0} {answer}" in build_prompt(find_rubric("order"), "{question}", "{score} {0} {answer}").user


def test_the_nonce_repeats_for_the_same_item_and_differs_for_another():
    rubric = find_rubric("order")
    assert build_prompt(rubric, "a", "b").nonce == build_prompt(rubric, "a", "b").nonce
    assert build_prompt(rubric, "a", "b").nonce != build_prompt(rubric, "a", "c").nonce
    assert build_prompt(rubric, "ab", "").nonce != build_prompt(rubric, "a", "b").nonce
