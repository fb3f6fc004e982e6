"""Markdown from untrusted strings: names and data fields are shown verbatim and never become markup.

Characters with a meaning in Markdown or HTML are written as entities, line breaks as spaces, and non-printing
characters (control characters, bidirectional overrides) as their code.
"""

import re

_SPECIAL = re.compile(r"[\\`*_{}\[\]<>#+!|~&@$]|(?<=:)//|(?<=www)\.", re.IGNORECASE)
_PLAIN_CODE = re.compile(r"[^`|\\<>]*[^`|\\<>\s]")


def text(value) -> str:
    """`value` as inline text."""
    return _SPECIAL.sub(lambda match: "".join(f"&#{ord(char)};" for char in match[0]), _one_line(value))


def code(value) -> str:
    """`value` as inline code; safe inside tables as well."""
    line = _one_line(value).strip()
    return f"`{line}`" if _PLAIN_CODE.fullmatch(line) else f"<code>{text(line)}</code>"


def table(header: list[str], rows: list[list[str]], numbers: bool = False) -> str:
    """
    A Markdown table. The cells must be Markdown already.

    Args:
        numbers (`bool`): Whether to align all columns but the first to the right.
    """
    rule = ["---"] + ["---:" if numbers else "---"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def _one_line(value) -> str:
    line = " ".join(str(value).split())
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in line)
