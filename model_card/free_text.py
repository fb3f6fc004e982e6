"""The card's free-text sections: the publisher's own words, which survive verbatim when the card is regenerated.

In `README.md` each section is enclosed in two comment lines that name it. Everything outside is generated.
"""

import re

DEFAULTS = {
    "intended_use": (
        "Answering questions about images where some requests must be declined, in research or together with other\n"
        "safeguards. Whoever deploys the model sets the policy, logs the verdicts (category, level, score) and\n"
        "reviews them.\n"
    ),
    "out_of_scope_use": (
        "- As the only safeguard where a wrong answer can harm someone: the safety head misses some risky requests\n"
        "  and flags some harmless ones.\n"
        "- Judging people or content: a verdict is about a request to this model, not about the person behind it.\n"
        "- Languages, image types and risk categories that the training data do not cover.\n"
        "- Producing unsafe content: the verdicts must not be used to search for prompts that get through.\n"
    ),
    "remarks": "_None yet. The publisher of the model can add here what the sections above do not say._\n",
}
_MARKER = re.compile(r"<!-- (/?)yours: (\w+) -->\s*")


def block(name: str, content: str) -> str:
    """A free-text section with its two comment lines."""
    return f"<!-- yours: {name} -->\n{content}<!-- /yours: {name} -->"


def read_free_text(card: str) -> dict[str, str]:
    """
    The free-text sections of a card, by name.

    Raises:
        `ValueError`: The comment lines do not pair up, so that it is unclear what is free text.
    """
    found: dict[str, str] = {}
    name, lines = None, []
    for number, line in enumerate(_lines(card), start=1):
        match = _MARKER.fullmatch(line)
        if match is None or match[2] not in DEFAULTS:
            lines.append(line)
            continue
        closes = bool(match[1])
        if closes != (name is not None) or (closes and match[2] != name) or (not closes and match[2] in found):
            raise ValueError(
                f"README.md, line {number}: {line.strip()!r} is misplaced, so that free text cannot be told from "
                f"generated text. Enclose each section in one pair of lines, '<!-- yours: NAME -->' and "
                f"'<!-- /yours: NAME -->'."
            )
        if closes:
            found[name], name = "".join(lines), None
        else:
            name, lines = match[2], []
    if name is not None:
        raise ValueError(f"README.md: the line '<!-- /yours: {name} -->' is missing. Add it after the section's text.")
    return found


def _lines(card: str) -> list[str]:
    """Lines with their ends. `str.splitlines` also splits at characters that editors do not treat as line ends."""
    return re.findall(r"[^\n]*\n|[^\n]+", card)
