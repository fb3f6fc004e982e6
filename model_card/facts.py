"""The facts on a card: what training, evaluation and calibration recorded, in `card_facts.json` beside the model.

    model_name, language, license, license_source    as the card shows them
    base_model    {"name", "revision", "license", "files": {name: SHA-256}, "about"}
    training      {"command", "about", "rows", "held_out", "skipped", "categories": {name: rows}, "levels": {...},
                   "data": [{"name", "sha256", "revision", "license"}], "mixes": [...],
                   "stages": [{"stage", "arguments": {...}, "measured": {...}}]}
    results       [{"title", "data", "revision", "command", "device", "date", "versions": {...}, "system", "policy",
                   "measures": [{"name", "title", "section", "n", "percent", "higher_is_better",
                                 "values": {system: value}, "intervals": {system: [low, high]}}]}]
    calibration   {"data", "command", "device", "date", "versions", "policy", "aim", "fit", "report", "measures"}
    plots         [{"file", "title"}], files beside the card

Everything but `model_name` is optional; where it is missing, the card says "not recorded", "not evaluated" or
"unknown". `system` says which of a result's systems is the model in this folder. `policy` is a [`policy_mark`], or
has only a name if results of an older release do not record it.
"""

import json
import math
import os
import re
import shlex
from hashlib import sha256
from pathlib import Path

from safevlm.files import replace_json
from safevlm.safety_policy import SafetyPolicy

FACTS_FILE = "card_facts.json"
FIELDS = (
    *("model_name", "language", "license", "license_source", "base_model", "training", "results", "calibration"),
    "plots",
)
SECTIONS = ("safety", "over-refusal", "general ability", "safety head")
ORIGIN = ("data", "command", "device", "date")
"""Fields that must accompany every number."""


def read_facts(model_dir: str | os.PathLike) -> dict:
    """The facts beside a model; only a name if none were recorded."""
    path = Path(model_dir) / FACTS_FILE
    if not path.is_file():
        return {"model_name": "SafeVLM"}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        check_facts(facts)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return facts


def write_facts(model_dir: str | os.PathLike, facts: dict):
    replace_json(Path(model_dir) / FACTS_FILE, facts)


def check_facts(facts: dict):
    """
    Raises:
        `ValueError`: There are unknown fields, results without their origin, or values that are not numbers.
    """
    if not isinstance(facts, dict) or not isinstance(facts.get("model_name"), str):
        raise ValueError("Card facts must be a mapping with a `model_name`.")
    if unknown := sorted(set(facts) - set(FIELDS)):
        raise ValueError(f"Card facts have unknown fields {', '.join(unknown)}; known: {', '.join(FIELDS)}.")
    for result in facts.get("results") or ():
        _check_origin(result, "results")
        _check_fields(result, ("title", "measures"), "a result")
        for measure in result["measures"]:
            _check_fields(measure, ("name", "section", "values"), "a measure")
            if measure["section"] not in SECTIONS:
                raise ValueError(f"Card measure {measure['name']!r}: `section` must be one of {', '.join(SECTIONS)}.")
            for value in measure["values"].values():
                number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
                if value is not None and not number:
                    raise ValueError(
                        f"Result {measure['name']!r} has the value {value!r}; it must be a finite number."
                    )
    for plot in facts.get("plots") or ():
        if not re.fullmatch(r"plots/[\w.-]+\.png", str(plot.get("file"))):
            raise ValueError(f"Card plot {plot.get('file')!r} must be a file such as plots/name.png.")
    if facts.get("calibration"):
        _check_origin(facts["calibration"], "calibration")


def _check_fields(block: dict, names: tuple[str, ...], what: str):
    if missing := [name for name in names if name not in block]:
        raise ValueError(f"Card facts: {what} lacks {', '.join(missing)}.")


def _check_origin(block: dict, where: str):
    if missing := [name for name in ORIGIN if not block.get(name)]:
        raise ValueError(f"Card `{where}` lack {', '.join(missing)}: no number without its origin.")


def policy_mark(policy: dict) -> dict[str, str]:
    """Name and digest of a policy; equal marks mean equal policies. Fields that an older file lacks get defaults."""
    content = json.dumps(SafetyPolicy.from_value(policy).to_dict(), sort_keys=True)
    return {"name": policy["name"], "sha256": sha256(content.encode()).hexdigest()}


def portable_command(command: str | list[str]) -> str:
    """A command line that reveals nothing about this machine: only the last part of absolute paths is kept."""
    words = shlex.split(command) if isinstance(command, str) else map(str, command)
    return shlex.join(portable_word(word) for word in words)


def portable_word(word: str) -> str:
    """A word of a command line, for [`portable_command`]; `--option=/some/path` becomes `--option=path`."""
    option, equals, value = word.rpartition("=")
    if value.startswith(("/", "~")) or (value[1:3] in (":\\", ":/")):
        value = value.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or "/"
    return option + equals + value
