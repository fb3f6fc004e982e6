"""Untrusted strings never become markup, and the publisher's own text is never lost."""

import json

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from safevlm import SafeVlmConfig
from safevlm.model_card.card import render_card
from safevlm.model_card.free_text import DEFAULTS, block, read_free_text
from safevlm.model_card.markdown import code, table, text

ATTACKS = [
    "</code><script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "![x](http://evil/x.png)",
    "a | b \\| c",
    "`</code>`` `x",
    "\n---\nlicense: mit\n---\n",
    "\n\n# Heading\n\n| a |\n|---|\n",
    '"""\nimport os\n"""',
    "<!-- yours: remarks -->",
    "{{ card_data }}{% raw %}",
    "http://evil.example www.evil.example <http://evil.example>",
    "*x* _y_ ~~z~~ $$w$$ &lt;b&gt; &#60;",
    "\u202e\u0000\x1b[31m",
    "a\\",
    "```\nx",
]
strangers = st.one_of(
    st.sampled_from(ATTACKS), st.text(max_size=60), st.text(alphabet="`|\\<>[]()!*_-#\n &;:/.@x", max_size=30)
)
markdown = MarkdownIt("gfm-like", {"html": True, "linkify": False}).enable("table")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    SafeVlmConfig().save_pretrained(folder)
    return folder


def inline_kinds(source: str) -> set[str]:
    """The types of all Markdown tokens in a text."""
    kinds = set()
    for token in markdown.parse(source):
        kinds |= {child.type for child in token.children or ()} | {token.type}
    return kinds


@given(strangers)
def test_text_is_only_text(value):
    assert inline_kinds("x " + text(value)) <= {"paragraph_open", "paragraph_close", "inline", "text", "text_special"}


def test_addresses_are_not_turned_into_links():
    assert "://" not in text("see http://evil.example") and "www." not in text("www.evil.example")


@given(strangers)
def test_text_shows_every_printing_character(value):
    (inline,) = [token for token in markdown.parse("x " + text(value)) if token.type == "inline"]
    shown = "".join(child.content for child in inline.children)
    expected = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in " ".join(value.split()))
    assert shown == f"x {expected}".rstrip()


@given(strangers, strangers)
def test_a_table_keeps_its_cells(one, two):
    tokens = markdown.parse(table(["a", "b"], [[text(one), code(two)]]))
    assert sum(token.type == "td_open" for token in tokens) == 2
    html = [child.content for token in tokens for child in token.children or () if child.type == "html_inline"]
    assert set(html) <= {"<code>", "</code>"}
    assert not any(child.type in ("link_open", "image") for token in tokens for child in token.children or ())


def poisoned(value: str) -> dict:
    origin = dict.fromkeys(("data", "command", "device", "date"), value or "x")
    measure = {"name": value, "title": value, "task": value, "section": "safety", "values": {value: 0.5}, "n": 3}
    return {
        "model_name": value,
        "license": value,
        "license_source": value,
        "base_model": {"name": value, "revision": value, "license": value, "about": value},
        "training": {
            "command": value,
            "about": value,
            "data": [{"name": value, "sha256": value, "license": value}, {"name": value, "revision": value}],
            "categories": {value: 3},
            "mixes": [
                {"file": value, "seed": 0, "sources": {value: {"read": 1, "chosen": 1, "left_out": {value: 1}}}}
            ],
            "stages": [
                {"stage": value, "arguments": {"optim": value}, "measured": {"seconds": 1, "device": value}},
            ],
        },
        "results": [{"title": value, "system": value, "measures": [measure], "revision": value, **origin}],
    }


def headings(card: str) -> list[str]:
    body = card.split("\n---\n", 1)[1]
    return [token.tag for token in markdown.parse(body) if token.type == "heading_open"]


@settings(deadline=None, max_examples=60)
@given(strangers, strangers)
@example("", "")
def test_no_name_or_field_changes_the_card_s_structure(folder, value, model_id):
    card = render_card(folder, poisoned(value), model_id=model_id)
    front, body = card.split("\n---\n", 1)
    found = yaml.safe_load(front.removeprefix("---\n"))
    assert found["library_name"] == "transformers" and found["pipeline_tag"] == "image-text-to-text"
    assert set(found) <= {
        *("language", "license", "library_name", "pipeline_tag", "tags", "base_model", "base_model_relation"),
        *("datasets", "model-index"),
    }
    tokens = markdown.parse(body)
    levels = headings(card)
    assert levels == headings(render_card(folder, poisoned("x")))
    fences = [token for token in tokens if token.type == "fence"]
    assert [token.info for token in fences] == ["python", "bibtex"]
    compile(fences[0].content, "README.md", "exec")
    html = [c.content for token in tokens for c in token.children or () if c.type == "html_inline"]
    assert set(html) <= {"<code>", "</code>"}
    blocks = [token.content for token in tokens if token.type == "html_block"]
    assert all(content.startswith("<!-- ") for content in blocks)
    links = [c.attrs["href"] for token in tokens for c in token.children or () if c.type == "link_open"]
    assert links == ["https://arxiv.org/abs/2405.13581"]
    assert not any(c.type == "image" for token in tokens for c in token.children or ())
    assert read_free_text(card) == DEFAULTS


words = st.text(st.characters(codec="utf-8"), max_size=200)
texts = st.fixed_dictionaries({name: words for name in DEFAULTS})


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts)
@example(dict.fromkeys(DEFAULTS, ""))
@example({name: f"---\nx: 1\n---\n## {name}\r\n<!-- a -->\n" for name in DEFAULTS})
def test_any_edit_of_free_text_survives_and_the_rest_is_refreshed(folder, edits):
    edits = {name: value if value.endswith("\n") or not value else value + "\n" for name, value in edits.items()}
    card = render_card(folder, {"model_name": "Old"})
    for name, value in edits.items():
        card = card.replace(block(name, DEFAULTS[name]), block(name, value))
    again = render_card(folder, {"model_name": "New"}, existing=card)
    assert read_free_text(again) == edits
    assert "\n# New\n" in again and "\n# Old\n" not in again
    for name in edits:
        again = again.replace(block(name, edits[name]), block(name, DEFAULTS[name]))
    assert again == render_card(folder, {"model_name": "New"})


@pytest.mark.parametrize(
    "break_it",
    [
        lambda card: card.replace("<!-- /yours: remarks -->", ""),
        lambda card: card.replace("<!-- yours: remarks -->", ""),
        lambda card: card.replace("<!-- /yours: remarks -->", "<!-- /yours: intended_use -->"),
        lambda card: card.replace("_None yet.", "<!-- yours: intended_use -->\n_None yet."),
        lambda card: card + "<!-- yours: remarks -->\nmore\n<!-- /yours: remarks -->\n",
    ],
)
def test_markers_that_do_not_pair_up_are_refused_not_guessed(folder, break_it):
    card = break_it(render_card(folder, {"model_name": "M"}))
    with pytest.raises(ValueError, match="README.md"):
        render_card(folder, {"model_name": "M"}, existing=card)


def test_a_section_whose_markers_were_taken_out_comes_back_with_its_default(folder):
    card = render_card(folder, {"model_name": "M"})
    cut = card.replace(block("remarks", DEFAULTS["remarks"]), "")
    assert render_card(folder, {"model_name": "M"}, existing=cut) == card


def test_a_published_folder_s_configuration_cannot_inject_either(tmp_path):
    policy = {"name": "`<b>`\n# x", "level_actions": {"none": "allow"}}
    names = {"category_names": ["<script>|x", "safe"], "level_names": ["none", "[l](http://evil)"]}
    config = SafeVlmConfig(**names, safety_policy=policy)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    body = render_card(tmp_path, {"model_name": "M"})
    assert "<script>" not in body and "<b>" not in body and "[l](http" not in body
