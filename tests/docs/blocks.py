"""The fenced blocks of the documents, as steps to run.

- `bash`, `sh` and `python` blocks are run in the order of the document; `python` blocks with `>>>` as doctests.
- A block after a line `<!-- file: NAME -->` is written to NAME instead.
- Other `json` and `yaml` blocks are parsed.
- A `text` block directly after a block that is run is its expected output, apart from figures; a line `...` stands for
  any lines. With a line `<!-- of a full demo -->` between the two, the output is compared only if the demo is a full
  one, because a roughly trained model answers differently.
- Any other `text` block (a drawing, the output of a command that no test repeats) is for people only, like `bibtex`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("modeling_safevlm", "processing", "trainer", "model_card", "tests")
RUN, WRITTEN, FOR_PEOPLE = ("bash", "sh", "python"), ("json", "yaml", "csv"), ("text", "", "bibtex")
FENCE = re.compile(r"^ {0,3}```(\S*)[^\n]*\n(.*?)^ {0,3}```[ ]*$", re.MULTILINE | re.DOTALL)
FULL_DEMO = "<!-- of a full demo -->"
FILE = re.compile(r"<!-- file: (\S+) -->\s*\Z")


@dataclass
class Block:
    """
    Args:
        where (`str`): `"FILE:LINE"`.
        file (`str`, *optional*): The file to write it to.
        output (`str`, *optional*): The expected output, shown directly after it.
        full_demo (`bool`): Whether the output is that of a full demo.
    """

    where: str
    language: str
    text: str
    file: str | None = None
    output: str | None = None
    full_demo: bool = False


def documents() -> list[str]:
    """The README*.md files of all folders and the other documents at the top, relative to the repository."""
    found = {*ROOT.glob("README*.md"), ROOT / "TUTORIAL.md", ROOT / "CONTRIBUTING.md"}
    for folder in FOLDERS:
        found |= set((ROOT / folder).rglob("README*.md"))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def read_blocks(document: str) -> list[Block]:
    """All fenced blocks of a document, in order."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks, end = [], 0
    for match in FENCE.finditer(text):
        between, where = text[end : match.start()], f"{document}:{text.count(chr(10), 0, match.start()) + 1}"
        named = FILE.search(between)
        block = Block(where, match[1], match[2], named[1] if named else None)
        if block.language == "text" and blocks and blocks[-1].language in RUN and between.strip() in ("", FULL_DEMO):
            blocks[-1].output, blocks[-1].full_demo = block.text, bool(between.strip())
        blocks.append(block)
        end = match.end()
    return blocks


def same_output(expected: str, printed: str) -> bool:
    """Whether `printed` has the lines of `expected` in order, apart from figures and blanks."""
    parts = re.split(r"^\s*\.\.\.\s*$", expected, flags=re.MULTILINE)
    pattern = r"(?:.*\n)*?".join("".join(re.escape(line) + r"\n" for line in _lines(part)) for part in parts)
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in _lines(printed))) is not None


def _lines(text: str) -> list[str]:
    """The lines that are not blank, with each number as 0 and runs of blanks, or of dashes in tables, as one."""
    lines = (re.sub(r"\d+(?:\.\d+)?(?:e[-+]\d+)?", "0", line) for line in text.splitlines())
    return [re.sub(r"-{2,}", "--", re.sub(r"\s+", " ", line.strip())) for line in lines if line.strip()]
