"""What the operator of the Space can set. Each setting is an environment variable: `SAFEVLM_` and its name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

PREFIX = "SAFEVLM_"


@dataclass(frozen=True)
class Settings:
    """
    Args:
        model (`str`): Hub id or folder of a SafeVLM. Its code will run, so name a model whose code you have read.
        revision (`str`): The model's commit. Without one, every start loads the newest code and weights.
        policies (`tuple` of `str`): What visitors can choose from; the first is the default. Each is a preset
            (`default`, `paper`, `strict`, `off`), a policy file in this folder, or the name of the model's own policy.
        compare (`bool`): Whether visitors may see the unfiltered answer beside the safe one.
        title (`str`): Headline of the page.
        max_new_tokens (`int`): Longest answer, in tokens.
        max_answer_seconds (`int`): Time limit for an answer, which is cut off there.
        max_question_chars (`int`): Longest question, in characters.
        max_turns (`int`): Longest conversation, in questions.
        max_file_mb (`int`): Largest file that can be uploaded.
        max_megapixels (`int`): Largest picture that is decoded.
        max_audit_images (`int`): Pictures per audit.
        max_uploads_mb (`int`): Disk space for the uploads of all visitors together.
        requests_per_minute (`int`): Per network address. An audit counts once per picture; uploads count as well.
        queue_size (`int`): Requests that can wait; further ones are turned away.
        proxies (`int`): Number of trusted proxies in front. Each adds an entry to `X-Forwarded-For`; a Space has one.
    """

    model: str
    revision: str = ""
    policies: tuple[str, ...] = ("default", "strict")
    compare: bool = True
    title: str = "SafeVLM"
    max_new_tokens: int = 512
    max_answer_seconds: int = 120
    max_question_chars: int = 2000
    max_turns: int = 20
    max_file_mb: int = 20
    max_megapixels: int = 25
    max_audit_images: int = 32
    max_uploads_mb: int = 4000
    requests_per_minute: int = 60
    queue_size: int = 32
    proxies: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """
        Raises:
            `ValueError`: A variable is missing, unknown or has an invalid value.
        """
        given = {name[len(PREFIX) :].lower(): text for name, text in environment.items() if name.startswith(PREFIX)}
        known = {field.name: field.type for field in fields(cls)}
        if unknown := sorted(set(given) - set(known)):
            names = ", ".join(PREFIX + name.upper() for name in known)
            raise ValueError(f"Unknown setting {PREFIX}{unknown[0].upper()}; known: {names}.")
        if not given.get("model", "").strip():
            raise ValueError(f"Set {PREFIX}MODEL to the Hub id (or folder) of the SafeVLM to show.")
        if environment.get("SPACE_ID"):
            given.setdefault("proxies", "1")
        return cls(**{name: _parse(name, known[name], text.strip()) for name, text in given.items()})


def _parse(name: str, kind: str, text: str):
    variable = PREFIX + name.upper()
    if kind == "int":
        lowest = 0 if name == "proxies" else 1
        if not text.isdecimal() or int(text) < lowest:
            raise ValueError(f"{variable} must be a whole number from {lowest}, got {text!r}.")
        return int(text)
    if kind == "bool":
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"{variable} must be true or false, got {text!r}.")
        return text.lower() in ("true", "1")
    if kind == "str":
        return text
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise ValueError(f"{variable} must name at least one policy, such as 'default,strict'; got {text!r}.")
    return names
