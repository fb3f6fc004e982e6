"""The commands in the documents work, and print what the documents show."""

import argparse
import json
import re
import shlex

import pytest
import yaml
from blocks import FOR_PEOPLE, ROOT, RUN, WRITTEN, Block, documents, read_blocks, same_output
from workplace import OF_A_FAST_DEMO, PREPARE, SUBSTITUTES

from safevlm.trainer.cli import build_parser

DOCUMENTS = documents()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_is_of_a_kind_that_is_run_written_or_for_people(document):
    """No block is left out silently: a block in another language needs a decision."""
    for block in read_blocks(document):
        assert block.language in (*RUN, *WRITTEN, *FOR_PEOPLE), (
            f"{block.where}: what should be done with a {block.language!r} block?"
        )
        if block.language == "csv":
            assert block.file, f"{block.where}: a csv block is written to a file; name it with <!-- file: NAME -->"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_data_in_the_documents_is_valid(document):
    for block in read_blocks(document):
        if block.language == "json":
            for line in block.text.splitlines() if block.file and block.file.endswith(".jsonl") else [block.text]:
                json.loads(line)
        if block.language == "yaml":
            assert yaml.safe_load(block.text), block.where


@pytest.mark.slow
@pytest.mark.documents
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if any(b.language in RUN for b in read_blocks(d))])
def test_every_command_runs_and_prints_what_the_document_shows(document, workplace, demo, free_port):
    blocks = [b for b in read_blocks(document) if b.language in RUN or b.file]
    expected = [block for block in blocks if not block.file]
    done = workplace.run(document, blocks, demo, free_port)
    for step in done:
        assert step["code"] == 0, (
            f"{step['where']} ended with {step['code']}:\n{step['text']}\n{step['errors'][-3000:]}"
        )
    assert [step["where"] for step in done] == [block.where for block in expected]
    is_full = not json.loads((demo / "settings.json").read_text())["fast"]
    shown = [
        step for step, block in zip(done, expected, strict=True) if block.output and (is_full or not block.full_demo)
    ]
    wrong = [step for step in shown if not same_output(step["output"], step["printed"])]
    assert not wrong, "\n".join(
        f"{step['where']} shows\n{step['output']}\nbut\n{step['text']}\nprints\n{step['printed']}" for step in wrong
    )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_safevlm_command_has_the_options_it_is_shown_with(document):
    """Even in sentences, which nothing runs."""
    text = (ROOT / document).read_text(encoding="utf-8")
    inline = re.findall(r"`(safevlm [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for command in inline:
        words = shlex.split(command)[1:]
        action = _subcommand(build_parser(), words)
        known = {option for one in action._actions for option in one.option_strings}
        unknown = {word for word in words if word.startswith("--")} - known
        assert not unknown, f"{document}: `{command}`: {action.prog} has no {', '.join(unknown)}"


def _subcommand(parser, words: list[str]):
    """The parser of a command, or of its action (`data check`)."""
    choices = [one.choices for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    return _subcommand(choices[0][words[0]], words[1:]) if choices and words else parser


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_within_the_repository_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), f"{document}: {link}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles]
            assert anchor in slugs, f"{document}: {link}"


def test_substitutes_are_all_in_use():
    text = "".join(block.text for document in DOCUMENTS for block in read_blocks(document) if block.language in RUN)
    assert [shown for shown, _, _ in SUBSTITUTES + OF_A_FAST_DEMO if shown not in text] == []
    assert set(PREPARE) <= set(DOCUMENTS)


@pytest.mark.parametrize(
    "shown, printed, same",
    [
        ("risk 0.999\n", "risk 0.98\n\n", True),
        ("refuse\n", "allow\n", False),
        ("a\nb\n", "a\n", False),
        ("a\n...\nd\n", "a\nb\nc\nd\n", True),
        ("a\n...\n", "a\n", True),
        ("a\n...\nd\n", "b\nd\n", False),
        ("| x |  1.5 |\n|---|---:|\n", "| x | 12.25 |\n|-----|---:|\n", True),
    ],
)
def test_outputs_are_compared_up_to_figures(shown, printed, same):
    assert same_output(shown, printed) is same


def test_blocks_know_where_they_are_and_what_follows(tmp_path, monkeypatch):
    run, written = "```bash\nls\n```\n\n```text\nout\n```\n", "<!-- file: x.yaml -->\n```yaml\na: 1\n```\n"
    (tmp_path / "A.md").write_text(f"# A\n{run}{written}\nWords\n```text\nno\n```\n")
    monkeypatch.setattr("blocks.ROOT", tmp_path)
    run, _, written, _ = read_blocks("A.md")
    assert run == Block("A.md:2", "bash", "ls\n", None, "out\n")
    assert (written.file, written.text, written.output) == ("x.yaml", "a: 1\n", None)
