"""What guard models write is read in any known form; an unclear reply is never taken for a clear one."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from safevlm.trainer.evaluation.benchmarks.guard_replies import parse_guard_reply

RATIONALE = 'It says "rating": "Safe" on the sign.'


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        # Llama Guard
        ("safe", (False, None)),
        ("\n\nsafe\n", (False, None)),
        ("unsafe\nS1,S9", (True, "S1,S9")),
        ("unsafe\n S2 , S3", (True, "S2,S3")),
        ("unsafe S9", (True, "S9")),
        ("UNSAFE: s1, s9.", (True, "S1,S9")),
        ("Unsafe", (True, None)),
        ("unsafe\nO3", (True, "O3")),
        ("```\nunsafe\nS1\n```", (True, "S1")),
        # Qwen3Guard
        ("Safety: Unsafe\nCategories: Violent\nRefusal: No", (True, "Violent")),
        ("safety : UNSAFE\n\ncategories:  Violent, PII ", (True, "Violent, PII")),
        ("Safety: Safe\nCategories: None\nRefusal: Yes", (False, None)),
        ("Safety: Controversial\nCategories: Politically Sensitive Topics", (True, "Politically Sensitive Topics")),
        # LlavaGuard
        (json.dumps({"rating": "Unsafe", "category": "O2: Violence", "rationale": RATIONALE}), (True, "O2: Violence")),
        ('```json\n{\n "rating": "Safe",\n "category": "NA: None applying",\n "rationale": ""\n}\n```', (False, None)),
        ('{"rating": "Unsafe", "category": "O2: Violence", "rationale": "The ima', (True, "O2: Violence")),
        ('{"rating": "Unsafe", "category": "O2: Vio', (True, None)),
        # ShieldGemma, Granite Guardian
        ("Yes", (True, None)),
        (" no.", (False, None)),
        ("Yes\n<confidence> High </confidence>", (True, None)),
        ("<score> no </score>", (False, None)),
        # WildGuard, GuardReasoner, Nemotron
        ("Harmful request: yes\nResponse refusal: no\nHarmful response: no", (True, None)),
        ("<think>Harmless?</think><result>\nRequest: harmful\nResponse: unharmful\n</result>", (True, None)),
        ('{"User Safety": "unsafe", "Safety Categories": "Violence, Fraud"}', (True, "Violence, Fraud")),
        # Reasoning first
        ("<think>\nThis looks safe.\n</think>\n\nunsafe\nS3", (True, "S3")),
        ("It may be unsafe.</think>safe", (False, None)),
    ],
)
def test_verdicts_of_published_guards_are_read(reply, expected):
    assert parse_guard_reply(reply) == expected


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "safe\nS1",
        "This is unsafe",
        "not safe",
        "safe, I think",
        "unsafe\nbecause of S1",
        "yes, it is safe",
        "<think>It is safe",
        "Safety: Safe\nCategories: Violent",
        "Safety: Safe\nSafety: Unsafe",
        "Safety: Rather safe",
        "Safety: Safe\nI am sure.",
        '{"rating": "Uns',
        '{"rating": null}',
        '{"rating": "Safe", "rating": "Unsafe"}',
        '{"rating": "Safe"} or is it?',
        '{"safety": "safe", "rating": "unsafe"}',
        '["safe"]',
    ],
)
def test_what_is_no_verdict_or_two_is_none(reply):
    assert parse_guard_reply(reply) == (None, None)


@given(st.text(max_size=40) | st.text("safeunyo\n :{}\"'1,S", max_size=20))
@example("</think>safe")
def test_nothing_is_safe_without_a_word_that_says_so(reply):
    flagged, categories = parse_guard_reply(reply)
    if flagged is False:
        assert categories is None and any(word in reply.lower() for word in ("safe", "no", "unharmful"))
