"""What a chat's texts may be, and may not: user text can never become a control token.

A template sees dicts, lists and strings only, each string neutralised: anything that spells a special token
(`<image>`, `<safety>`, `</s>`, ...), be it across several texts of a message, gets a space after its first character.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import numpy as np

# Fields of a content part that say where a picture is. They go to the image loader as they are.
SOURCES = ("image", "image_url", "url", "path", "base64")


class ControlTokens:
    """
    Args:
        tokens (`set[str]`): What the tokenizer reads as one token, wherever it stands in a text.
        normalise (`Callable`, *optional*): What it does to a text before it looks for them.
    """

    def __init__(self, tokens: set[str], normalise: Callable[[str], str] | None = None):
        self.normalise = normalise
        self.tokens = {token for token in tokens if len(token) > 1 and not token.isspace()}
        self.lengths = sorted({len(token) for token in self.tokens})
        self.first = re.compile("[" + "".join({re.escape(token[0]) for token in self.tokens}) + "]")

    def find(self, text: str) -> list[tuple[int, int]]:
        """Start and end of each token in `text`; where several start at one place, the longest."""
        found = []
        for match in self.first.finditer(text) if self.tokens else ():
            start = match.start()
            ends = [start + length for length in self.lengths if text[start : start + length] in self.tokens]
            if ends:
                found.append((start, ends[-1]))
        return found

    def neutralise(self, texts: list[str]) -> list[str]:
        """`texts` without the tokens that they spell, each by itself or joined to the next one."""
        starts = [start for start, _ in self.find("".join(texts))][::-1]
        neutral, offset = [], 0
        for text in texts:
            pieces, last = [], 0
            while starts and starts[-1] < offset + len(text):
                cut = starts.pop() - offset + 1
                pieces.append(text[last:cut])
                last = cut
            neutral.append(" ".join([*pieces, text[last:]]))
            offset += len(text)
        return neutral


def plain_messages(chat, tokens: ControlTokens) -> list[dict]:
    """
    A chat as templates read it, neutralised: plain dicts, `content` as a list of parts, images as they came.

    Raises:
        `ValueError`: Something in it is neither text nor an image.
    """
    if not isinstance(chat, (list, tuple)) or not chat:
        raise ValueError(f"A chat must be a list of messages, got {_short(chat)}.")
    return [_plain_message(message, f"messages[{i}]", tokens) for i, message in enumerate(chat)]


def plain(value, where: str, tokens: ControlTokens):
    """Anything else that a template gets (tools, documents, ...), neutralised. What it cannot read is passed on."""
    if isinstance(value, str):
        return tokens.neutralise([checked_text(value, where)])[0]
    if isinstance(value, Mapping):
        return {plain(key, where, tokens): plain(item, f"{where}[{key!r}]", tokens) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]", tokens) for i, item in enumerate(value)]
    if isinstance(value, np.generic):
        return plain(value.item(), where, tokens)
    if dataclasses.is_dataclass(value) and not isinstance(value, type) or hasattr(value, "model_dump"):
        raise ValueError(f"`{where}` is a {type(value).__name__}, whose texts cannot be checked. Pass a dict.")
    return value


def _plain_message(message, where: str, tokens: ControlTokens) -> dict:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"`{where}` must be a dict with a 'role' and a 'content', got {_short(message)}.")
    fields = {
        _key(name, tokens): plain(value, f"{where}[{name!r}]", tokens)
        for name, value in message.items()
        if name != "content"
    }
    content, where = message.get("content"), f"{where}['content']"
    if content is None:  # a message of tool calls
        return fields
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"`{where}` must be text or a list of parts, got {_short(content)}.")
    parts = [_plain_part(part, f"{where}[{i}]", tokens) for i, part in enumerate(content)]
    texts = [part for part in parts if "text" in part]
    # Templates may join texts without anything between them: "<ima", "ge>" becomes "< ima", "ge>".
    for part, text in zip(texts, tokens.neutralise([part["text"] for part in texts]), strict=True):
        part["text"] = text
    return {**fields, "content": parts}


def _check_source(value, where: str, tokens: ControlTokens):
    for text in value.values() if isinstance(value, Mapping) else [value]:
        if isinstance(text, str) and (found := tokens.find(text)):
            token = text[slice(*found[0])]
            raise ValueError(f"`{where}` says where a picture is with the control token {token!r}: rename it.")


def _plain_part(part, where: str, tokens: ControlTokens) -> dict:
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise ValueError(f"`{where}` must be a dict with a 'type', got {_short(part)}.")
    if part["type"] == "text" or "text" in part:
        if not isinstance(part.get("text"), str):
            raise ValueError(f"`{where}['text']` must be a string, got {_short(part.get('text'))}.")
        part = {**part, "text": checked_text(part["text"], f"{where}['text']")}
    kept = ("text", *SOURCES)  # the message's texts are neutralised together
    for name in SOURCES:
        _check_source(part.get(name), f"{where}[{name!r}]", tokens)
    return {
        _key(name, tokens): value if name in kept else plain(value, f"{where}[{name!r}]", tokens)
        for name, value in part.items()
    }


def _key(name, tokens: ControlTokens):
    return tokens.neutralise([name])[0] if isinstance(name, str) else name


def checked_text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{where}` holds a lone surrogate, {value[error.start]!r}, at {error.start}: that is half a character. "
            f"Decode the text anew, or remove it."
        ) from None
    return str.__str__(value)  # without what a subclass adds


def _short(value) -> str:
    text = repr(value) if isinstance(value, (str, int, float, type(None))) or value == [] else type(value).__name__
    return text if len(text) <= 40 else text[:40] + "..."
