"""Reads what guard models write: a request is safe, or unsafe and in which categories, or the reply is unclear.

Known forms: Llama Guard (`unsafe`, then codes on the same or the next line), ShieldGemma and Granite Guardian (`Yes`:
it violates the policy), Qwen3Guard (lines `Safety: Unsafe`, `Categories: ...`), WildGuard (`Harmful request: yes`),
GuardReasoner (`Request: harmful`), LlavaGuard (JSON with `rating` and `category`) and Nemotron (JSON with `User
Safety`). Case, white space, code fences and reasoning do not matter. "Controversial" counts as unsafe. Anything else
is unclear, and so is a contradiction: a guess could let through what the guard did not.
"""

import json
import re

from safevlm.trainer.evaluation.reasoning import split_reasoning

_FLAGGED = {
    **dict.fromkeys(("unsafe", "controversial", "harmful", "yes"), True),
    **dict.fromkeys(("safe", "unharmful", "no"), False),
}
_PLAIN = re.compile(rf"({'|'.join(_FLAGGED)})[\s.,:;]*((?:[SO]\d+[\s,;.]*)*)", re.IGNORECASE)
_LINE = re.compile(r"([A-Za-z ]+):(.*)")
_JSON_TEXT = re.compile(r'"([^"\\]+)"\s*:\s*"((?:[^"\\]|\\.)*)"')
_AROUND = re.compile(r"^```\w*|```$|<confidence>.*?</confidence>|</?(?:score|result)>", re.IGNORECASE | re.DOTALL)
_NO_CATEGORY = re.compile(r"(?:none|null|n/?a\b.*|)", re.IGNORECASE | re.DOTALL)
_RATINGS = ("safety", "rating", "user_safety", "harmful_request", "request")  # on the request, not on an answer
_CATEGORIES = ("categories", "category", "safety_categories")


def parse_guard_reply(reply: str) -> tuple[bool | None, str | None]:
    """
    `(flagged, categories)` of a guard's reply; `(None, None)` if it is unclear.

    `"unsafe\\nS1,S9"` gives `(True, "S1,S9")`.
    """
    text = _AROUND.sub("", split_reasoning(reply)[0]).strip()
    if plain := _PLAIN.fullmatch(text):
        flagged, categories = _FLAGGED[plain[1].lower()], ",".join(re.findall(r"\w+", plain[2].upper()))
    else:
        fields = _fields(text)
        ratings = {_FLAGGED.get(fields[name].strip(" .").lower()) for name in _RATINGS if name in fields}
        flagged = ratings.pop() if len(ratings) == 1 else None
        categories = next((fields[name].strip() for name in _CATEGORIES if name in fields), "")
    if _NO_CATEGORY.fullmatch(categories):
        categories = None
    if flagged is None or (categories and not flagged):
        return None, None
    return flagged, categories


def _fields(text: str) -> dict[str, str]:
    """Names and values of JSON or of lines `name: value`; empty if the text is neither, or contradicts itself."""
    if text.startswith("{"):
        try:
            pairs, end = json.JSONDecoder(object_pairs_hook=list).raw_decode(text)
            pairs = pairs if end == len(text) else []
        except ValueError:  # cut off by the token limit: complete entries count
            pairs = [match.groups() for match in _JSON_TEXT.finditer(text)]
    else:
        lines = [_LINE.fullmatch(line.strip()) for line in text.splitlines() if line.strip()]
        pairs = [line.groups() for line in lines] if all(lines) else []
    fields: dict[str, str] = {}
    for name, value in pairs:
        value = ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
        name = name.strip().lower().replace(" ", "_")
        if fields.setdefault(name, value) != value:
            return {}  # two values for one name
    return fields
