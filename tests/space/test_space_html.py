"""What the page shows: everything is escaped, and told in words, not by colour alone."""

from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safevlm import SafetyPolicy

HOSTILE = '<img src=x onerror="alert(1)">'
OWN_TAGS = {"ol", "li", "p", "span", "img", "div", "section", "h2", "h3", "dl", "dt", "dd", "ul", "small", "strong"}
OWN_TAGS |= {"table", "thead", "tbody", "tr", "th", "td"}


class Reader(HTMLParser):
    """Collects the texts of paragraphs, and all tags and attributes."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.paragraphs, self.tags, self.attributes, self.words, self._open = [], set(), set(), "", False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self._open = tag == "p"
        if self._open:
            self.paragraphs.append("")

    def handle_endtag(self, tag):
        self._open = False

    def handle_data(self, data):
        self.words += data
        if self._open:
            self.paragraphs[-1] += data


def safety(action="refuse", category="politics", level="high", score=0.9, **changes):
    return {
        "assessed": True,
        "action": action,
        "category": category,
        "level": level,
        "score": score,
        "level_probabilities": {"none": 1 - score, "low": 0.0, "medium": 0.0, level: score},
        "category_probabilities": {category: score, "safe": 1 - score},
        **changes,
    }


# HTML has no place for these characters; browsers replace them.
texts = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=60)


@given(question=texts, answer=texts)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_conversation_is_shown_as_the_plain_text_it_is(modules, question, answer):
    read = Reader(modules.chat_html.conversation([modules.chat_model.Turn(question, answer=answer)]))
    assert read.paragraphs == [question, answer]
    assert read.tags <= OWN_TAGS and not any(name.startswith("on") for name in read.attributes)


def test_names_from_the_model_and_from_files_are_escaped(modules):
    verdict_html = modules.verdict_html
    pages = [
        verdict_html.verdict(safety(category=HOSTILE, level=HOSTILE), HOSTILE),
        verdict_html.audit_table([{"file": HOSTILE, "thumbnail": "", "error": HOSTILE}], 1),
        verdict_html.audit_table([{"file": HOSTILE, "thumbnail": "", "safety": safety(category=HOSTILE)}], 1),
        modules.chat_html.notice(HOSTILE),
    ]
    for page in pages:
        read = Reader(page)
        assert HOSTILE.lower() in read.words.lower() and "img" not in read.tags


@pytest.mark.parametrize(
    ("action", "word"), [("allow", "Allowed"), ("caution", "Caution"), ("warn", "Warning"), ("refuse", "Refused")]
)
def test_every_action_is_told_in_a_word_and_a_mark(modules, action, word):
    read = Reader(modules.verdict_html.verdict(safety(action), "default"))
    assert word in read.words and modules.verdict_html.ACTIONS[action][0] in read.words
    assert "Under the policy “default”" in read.words


def test_the_verdict_lists_all_probabilities_most_probable_first(modules):
    probabilities = {"politics": 0.25, "safe": 0.7, "privacy": 0.05}
    words = Reader(modules.verdict_html.verdict(safety(category_probabilities=probabilities), "x")).words
    bars = words.split("Category probabilities")[1]
    assert bars.startswith("safe70.0 %politics25.0 %privacy5.0 %")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.0 %"), (1e-9, "&lt; 0.1 %"), (0.5, "50.0 %"), (0.99999, "&gt; 99.9 %"), (1.0, "100.0 %")],
)
def test_a_probability_is_never_rounded_to_certainty(modules, value, text):
    assert modules.verdict_html.percent(value) == text


def test_what_was_not_assessed_is_said(modules):
    assert "Not assessed" in modules.verdict_html.verdict({"assessed": False, "action": "allow"}, "default")
    assert "nothing was assessed" in modules.verdict_html.verdict(modules.chat_model.NO_VERDICT, "off")


def test_the_audit_counts_its_verdicts(modules):
    rows = [{"file": "a", "thumbnail": "", "safety": safety("allow", "safe", "none")} for _ in range(2)]
    rows += [{"file": "b", "thumbnail": "", "safety": safety()}, {"file": "c", "thumbnail": "", "error": "bad"}]
    assert "4 of 9 pictures: 2 allowed · 1 refused · 1 unreadable" in modules.verdict_html.audit_table(rows, 9)


def test_a_head_that_failed_is_shown_as_a_refusal(modules):
    """Its numbers are `None`, and no NaN is shown."""
    names = ("category", "level", "score", "level_probabilities", "category_probabilities")
    failed = {"assessed": True, "action": "refuse", **dict.fromkeys(names), "error": "The head's <numbers>."}
    for html in (
        modules.verdict_html.verdict(failed, "default"),
        modules.verdict_html.audit_table([{"file": "a", "thumbnail": "", "safety": failed}], 1),
    ):
        assert "Refused" in html and "The head&#x27;s &lt;numbers&gt;." in html and "NaN" not in html


def test_an_answer_is_marked_busy_while_it_grows(modules):
    turn = modules.chat_model.Turn("q", modules.chat_model.Picture(None, (40, 20), "data:,"), "a", safety())
    running, done = modules.chat_html.conversation([turn], running=True), modules.chat_html.conversation([turn])
    assert 'aria-busy="true"' in running and "Refused" not in running
    assert 'aria-busy="false"' in done and "Refused" in done and 'alt="The picture you sent"' in done


def test_a_policy_is_said_in_a_line(modules):
    names = ["none", "low", "medium", "high"]
    line = modules.verdict_html.policy_line(SafetyPolicy(), names)
    assert line == "Counts as risky from a score of 50%. By level: low → caution, medium → warn, high → refuse."
    special = SafetyPolicy(category_actions={"privacy": {"low": "refuse"}})
    assert "some categories differ" in modules.verdict_html.policy_line(special, names)
    assert "Safety is off" in modules.verdict_html.policy_line(SafetyPolicy(enabled=False), names)
