"""From a chat to a prompt in which user text is never a control token and answers can be told from questions.

Control tokens: a template sees dicts, lists and strings only. Whatever spells a special token in them (`<image>`,
`<safety>`, `</s>`, ...) gets a space after its first character.

Answers: the safety head reads questions, never answers. Only the chat's messages say which is which. The rendered
text cannot: a user can spell any role marker. Nor can the template: some drop thoughts, move texts or write earlier
turns differently from the last one. So the chat is rendered once more with two marks that nobody can guess around each
text, and a text is where its marks are. If the template does not leave them in place, nothing counts as an answer, and
control tokens are counted against a render of the same chat without its words.
"""

import dataclasses
import re
import secrets
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise, product
from os.path import commonprefix
from typing import NamedTuple

import numpy as np
from transformers.utils import logging

logger = logging.get_logger(__name__)
Span = tuple[int, int]  # start and end, in characters
# Fields of a content part that say where a picture is. They reach the image loader unchanged.
SOURCES = ("image", "image_url", "url", "path", "base64")
# Where templates take an answer apart, to strip or move its thoughts.
TAGS = re.compile(r"(</?(?:think|thinking|thought|reasoning)>)")


class ChatPrompt(str):
    """
    A prompt rendered by the chat template. Any string operation turns it into a plain `str`, without `answers`.

    Args:
        answers (`list[tuple[int, int]]`, *optional*): What each assistant message became; `None` where the template
            hides it.
    """

    def __new__(cls, text: str, answers: list[Span] | None):
        prompt = super().__new__(cls, text)
        prompt.answers = answers
        return prompt


class ControlTokens:
    """
    Args:
        tokens (`set[str]`): What the tokenizer reads as one token wherever it stands in a text.
        normalise (`Callable`, *optional*): What the tokenizer does to a text before it looks for these tokens.
    """

    def __init__(self, tokens: set[str], normalise: Callable[[str], str] = str):
        self.normalise = normalise
        self.tokens = {token for token in tokens if len(token) > 1 and not token.isspace()}
        self.lengths = sorted({len(token) for token in self.tokens})
        self.first = re.compile("[" + "".join({re.escape(token[0]) for token in self.tokens}) + "]")

    def find(self, text: str) -> list[Span]:
        """Each token in `text`; where several start at one place, the longest."""
        starts = [match.start() for match in self.first.finditer(text)]
        longest = {i: i + length for i in starts for length in self.lengths if text[i : i + length] in self.tokens}
        return list(longest.items())

    def count(self, text: str) -> Counter[str]:
        return Counter(text[start:end] for start, end in self.find(text))

    def neutralise(self, texts: list[str]) -> list[str]:
        """`texts` with a space inside each token that they spell, alone or joined to the next text."""
        starts = [start for start, _ in self.find("".join(texts))]
        neutral, begin = [], 0
        for text in texts:
            end = begin + len(text)
            spelt = starts[bisect_left(starts, begin) : bisect_left(starts, end)]
            cuts = [0, *(start - begin + 1 for start in spelt), len(text)]
            neutral.append(" ".join(text[a:b] for a, b in pairwise(cuts)))
            begin = end
        return neutral


def plain_messages(chat, tokens: ControlTokens) -> list[dict]:
    """
    A chat as templates read it, neutralised: plain dicts, `content` as a list of parts, pictures unchanged.

    Raises:
        `ValueError`: Something in it is neither text nor an image.
    """
    if not isinstance(chat, (list, tuple)) or not chat:
        raise ValueError(f"A chat must be a list of messages, got {_short(chat)}.")
    messages = []
    for i, message in enumerate(chat):
        where = f"messages[{i}]"
        _check_dict(message, "role", where)
        content = message.get("content")
        messages.append(plain({name: message[name] for name in message if name != "content"}, where, tokens))
        if content is not None:  # a message of tool calls has none
            messages[-1]["content"] = _plain_parts(content, f"{where}['content']", tokens)
    return messages


def plain(value, where: str, tokens: ControlTokens):
    """Anything else that a template gets (tools, documents, ...), neutralised. What it cannot read stays as it is."""
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


def checked_text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{where}` holds a lone surrogate, {value[error.start]!r}, at {error.start}: that is half a character. "
            f"Decode the text again, or remove it."
        ) from None
    return str.__str__(value)  # without what a subclass adds


def _plain_parts(content, where: str, tokens: ControlTokens) -> list[dict]:
    if isinstance(content, str):
        content = [content]
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"`{where}` must be text or a list of parts, got {_short(content)}.")
    parts = []
    for i, part in enumerate(content):
        place = f"{where}[{i}]"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        _check_dict(part, "type", place)
        if (part["type"] == "text" or "text" in part) and not isinstance(part.get("text"), str):
            raise ValueError(f"`{place}['text']` must be a string, got {_short(part.get('text'))}.")
        sources = {name: part[name] for name in SOURCES if name in part}
        for name, source in sources.items():
            texts = source.values() if isinstance(source, Mapping) else [source]
            for token in tokens.count("\n".join(text for text in texts if isinstance(text, str))):
                place = f"{place}[{name!r}]"
                raise ValueError(f"`{place}` says where a picture is with the control token {token!r}: rename it.")
        others = {name: part[name] for name in part if name not in SOURCES}
        parts.append({**plain(others, place, tokens), **sources})
    # Templates may join texts without anything between them: "<ima", "ge>" becomes "< ima", "ge>".
    texts = [part for part in parts if "text" in part]
    for part, text in zip(texts, tokens.neutralise([part["text"] for part in texts]), strict=True):
        part["text"] = text
    return parts


def _check_dict(value, key: str, where: str):
    if not isinstance(value, Mapping) or not isinstance(value.get(key), str):
        raise ValueError(f"`{where}` must be a dict with a {key!r}, got {_short(value)}.")


def _short(value) -> str:
    text = repr(value) if isinstance(value, (str, int, float, type(None))) or value == [] else type(value).__name__
    return text if len(text) <= 40 else text[:40] + "..."


class MarkedText(NamedTuple):
    """Where a text of a chat is in the prompt, and what the template wrote between it and its neighbours."""

    start: int
    end: int
    author: int | None  # the index of the assistant's message
    before: str
    after: str


def render_chat(messages: list[dict], render: Callable[..., str], tokens: ControlTokens, **flags) -> ChatPrompt:
    """
    Args:
        messages (`list[dict]`): From [`plain_messages`].
        render (`Callable`): The chat template: `render(messages, add_generation_prompt=True)`.
        tokens (`ControlTokens`): What the template may write and no text of `messages` may become.
        flags: Passed on to `render`.

    Raises:
        `ValueError`: Texts became a control token, because the template joined or changed them.
    """
    prompt = render(messages, **flags)
    texts = find_texts(prompt, messages, render, **flags)
    if texts is not None:
        of_texts = _cover([(text.start, text.end) for text in texts])
        made = [prompt[start:end] for start, end in tokens.find(prompt) if any(of_texts[start:end])]
    else:
        wordless = [_each_text(message, lambda text: _between_tags(text, lambda piece: "x")) for message in messages]
        made = tokens.count(prompt) - tokens.count(render(wordless, **flags))
    _refuse(made, "chat template")
    _refuse(tokens.count(tokens.normalise(prompt)) - tokens.count(prompt), "tokenizer's normaliser")
    if not any(message["role"] == "assistant" for message in messages):
        return ChatPrompt(prompt, [])
    if texts is None:
        logger.warning_once(
            "The chat template does not show which parts of the prompt the assistant wrote: the safety head reads all."
        )
        return ChatPrompt(prompt, None)
    return ChatPrompt(prompt, _answers(texts, *_around_an_answer(render)))


def _refuse(made, maker: str):
    for token in made:
        raise ValueError(f"The {maker} makes the control token {token!r} of texts in `messages`. Change these texts.")


def find_texts(prompt: str, messages: list[dict], render, **flags) -> list[MarkedText] | None:
    """The texts of `messages` in `prompt`, or `None` if the template does not leave marks in place."""
    for inside, split in product((False, True), repeat=2):
        marks = Marks(inside, split)
        marked = [marks.put(message, i) for i, message in enumerate(messages)]
        try:
            rendered = render(marked, **flags)
        except Exception:  # about the marks: without them, the template has rendered these messages
            continue
        if (texts := marks.find(rendered, prompt)) is not None:
            return texts
    return None


class Marks:
    """
    A mark before and after each text of a chat.

    Args:
        inside (`bool`): Put the marks inside the white space at a text's ends, for templates that strip texts.
        split (`bool`): In an assistant's messages, treat each piece between `TAGS` as a text of its own.
    """

    def __init__(self, inside: bool, split: bool):
        self.inside, self.split = inside, split
        self.secret = f"\ue000{secrets.randbelow(10**12):012}"
        self.authors: list[int | None] = []  # one per text

    def put(self, message: dict, index: int) -> dict:
        """`message`, number `index` in its chat, with marks in it."""
        author = index if message["role"] == "assistant" else None

        def mark(text: str) -> str:
            mark = f"{self.secret}{len(self.authors)}"
            self.authors.append(author)
            core = text.strip() if self.inside else text
            before, _, after = text.partition(core) if core else (text, "", "")
            return f"{before}{mark}\ue001{core}{mark}\ue002{after}"

        def mark_pieces(text: str) -> str:
            return _between_tags(text, mark) if TAGS.search(text) else mark(text)

        return _each_text(message, mark if author is None or not self.split else mark_pieces)

    def find(self, marked: str, prompt: str) -> list[MarkedText] | None:
        """The texts in `prompt`, or `None` if `marked` is not `prompt` with whole pairs of marks."""
        pieces = re.split(f"{self.secret}([0-9]+)([\ue001\ue002])", marked)
        words, numbers, kinds = pieces[::3], pieces[1::3], pieces[2::3]
        paired = numbers[::2] == numbers[1::2] and kinds == ["\ue001", "\ue002"] * (len(kinds) // 2)
        if not paired or "".join(words) != prompt:
            return None
        authors = [self.authors[int(number)] for number in numbers[::2]]
        answers = [number for number, author in zip(numbers[::2], authors, strict=True) if author is not None]
        if len(set(answers)) < len(answers):  # the template repeats an answer, possibly in somebody else's name
            return None
        ends = list(accumulate(map(len, words)))
        return list(map(MarkedText, ends[::2], ends[1::2], authors, words[::2], words[2::2]))


def _answers(texts: list[MarkedText], header: str, lead: str, tail: str) -> list[Span]:
    """Each assistant message as one span, from after the `header`, or from the `lead`, up to and with the `tail`."""
    answers, last_author = [], None
    for start, end, author, before, after in texts:
        if author is not None:
            if author == last_author:
                start, _ = answers.pop()
            elif header and header in before:
                start -= len(before.rpartition(header)[2])
            elif before.endswith(lead):
                start -= len(lead)
            rest, found, _ = after.partition(tail) if tail else ("", "", "")
            if not found and TAGS.sub("", rest).strip():  # neither the turn's end nor the thoughts'
                rest = commonprefix([after, tail])
            answers.append((start, end + len(rest + found)))
        last_author = author
    return answers


def _around_an_answer(render) -> tuple[str, str, str]:
    """
    What the template writes around an answer: the header (the end of its generation prompt), the lead between header
    and answer (white space, an empty thought), and the tail (the end of the turn).
    """
    question, answer = (f"\ue000{secrets.randbelow(10**12):012}" for _ in range(2))
    roles = {"user": question, "assistant": answer}
    turns = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in roles.items()]
    try:
        asked, answered = render(turns[:1], add_generation_prompt=True), render(turns)
    except Exception:  # a template may insist on another form of chat
        return "", "", ""
    before, _, tail = answered.rpartition(answer)
    shared = commonprefix([asked, before])
    _, found, header = shared.rpartition(question)
    return (header.lstrip(), before.removeprefix(shared), tail) if found else ("", "", "")


def answer_mask(token_offsets: list[Span], replacements: list[dict], answers: list[Span]) -> list[int]:
    """
    Which tokens of a prompt an assistant wrote: 1 for each token that overlaps one of `answers`, else 0.

    Args:
        token_offsets (`list[tuple[int, int]]`): Where each token is in the text that was encoded.
        replacements (`list[dict]`): What the base's processor put in place of each image token before encoding: the
            token's `"span"` in the rendered prompt, and the `"new_span"` of its replacement.
        answers (`list[tuple[int, int]]`): Where each answer is in the rendered prompt.
    """
    of_answers = _cover(answers)
    for image in reversed(replacements):  # from the end, so that the other spans stay valid
        start, end = image["span"]
        new_start, new_end = image["new_span"]
        of_answers[start:end] = of_answers[start : start + 1] * (new_end - new_start)
    return [int(any(of_answers[start:end])) for start, end in token_offsets]


def _cover(spans: list[Span]) -> bytearray:
    """1 for each character in one of `spans`, else 0; ends with the last span."""
    covered = bytearray(max((end for _, end in spans), default=0))
    for start, end in spans:
        covered[start:end] = b"\1" * (end - start)
    return covered


def _each_text(value, change: Callable[[str], str], field=None):
    """`value`, a message or something in it, with `change` applied to each text."""
    if isinstance(value, str):
        return value if field in ("role", "type", *SOURCES) else change(value)
    if isinstance(value, dict):
        return {name: _each_text(item, change, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_each_text(item, change, field) for item in value]
    return value


def _between_tags(text: str, change: Callable[[str], str]) -> str:
    pieces = enumerate(TAGS.split(text))
    return "".join(piece if i % 2 or not piece.strip() else change(piece) for i, piece in pieces)
