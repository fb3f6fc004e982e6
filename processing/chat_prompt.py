"""A rendered chat that remembers what an assistant wrote in it, and what the safety head may read.

The safety head reads questions, never answers. Which is which follows from the chat's messages only: text cannot be
trusted to tell, as a user can spell any role marker. Nor can a template: some drop thoughts, move texts or write an
earlier turn otherwise than the last one. So each text is rendered once more between two marks that nobody can guess,
and a text is where its marks are. Where the template does not leave them in place, nothing counts as an answer, and
control tokens are counted against a render of the same chat without words.
"""

import os
import re
import secrets
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import product

from transformers.utils import logging

from .chat_texts import SOURCES, ControlTokens

logger = logging.get_logger(__name__)
MADE_OF_TEXTS = "The {} makes the control token {!r} of texts in `messages`. Change them."
# Where templates take an answer apart, to strip or move its thoughts.
TAGS = re.compile(r"(</?(?:think|thinking|thought|reasoning)>)")


class ChatPrompt(str):
    """
    A prompt rendered by the chat template. Any string operation turns it into a plain `str`, without `answers`.

    Args:
        answers (`list[tuple[int, int]]`, *optional*): Start and end of what assistant messages became, in characters;
            `None` where the template hides it.
    """

    answers: list[tuple[int, int]] | None

    def __new__(cls, text: str, answers: list[tuple[int, int]] | None):
        prompt = super().__new__(cls, text)
        prompt.answers = answers
        return prompt


def render_chat(messages: list[dict], render: Callable[..., str], tokens: ControlTokens, **flags) -> ChatPrompt:
    """
    Args:
        messages (`list[dict]`): From [`plain_messages`].
        render (`Callable`): Renders messages: `render(messages, add_generation_prompt=True)`.
        tokens (`ControlTokens`): Which the template may write, and no text of `messages`.
        flags: For `render`.

    Raises:
        `ValueError`: Texts became a control token, because the template joined or changed them.
    """
    text = render(messages, **flags)
    texts = find_texts(text, messages, render, **flags)
    if texts is None:
        _count_tokens(text, messages, render, tokens, **flags)
    else:
        _check_tokens(text, texts, tokens)
    if tokens.normalise is not None:
        _compare_tokens(tokens.normalise(text), text, tokens, "tokenizer's normaliser")
    if not any(message["role"] == "assistant" for message in messages):
        return ChatPrompt(text, [])
    answers = None if texts is None else _answers(text, texts, *_around_an_answer(messages, render))
    if answers is None:
        logger.warning_once(
            "The chat template does not show which parts of the prompt the assistant wrote: the safety head reads all."
        )
    return ChatPrompt(text, answers)


def find_texts(text: str, messages: list[dict], render, **flags) -> list[tuple[int, int, int | None]] | None:
    """
    Start, end and author (the assistant's message, or `None`) of each text of `messages` in their render `text`;
    `None` where the template does not leave marks as they are.
    """
    for inside, split in product((False, True), repeat=2):
        marks = Marks(messages, inside, split)
        try:
            marked = render(marks.messages, **flags)
        except Exception:  # whatever a template raises about marks; of the messages it would have raised before
            continue
        if marks.pattern.sub("", marked) == text and (texts := marks.find(marked)) is not None:
            return texts
    return None


class Marks:
    """
    Messages with a mark before and after each text.

    Args:
        inside (`bool`): Marks stand inside of the white space at a text's ends, for templates that strip texts.
        split (`bool`): In an assistant's messages each piece between `TAGS` counts as a text.
    """

    def __init__(self, messages: list[dict], inside: bool, split: bool):
        self.inside, self.split = inside, split
        self.secret = f"{secrets.randbelow(10**12):012}"
        self.pattern = re.compile(f"\ue000{self.secret}([0-9]+)([\ue001\ue002])")
        self.authors: list[int | None] = []  # of each text, the assistant's message that it is in
        self.messages = []
        for i, message in enumerate(messages):
            author = i if message["role"] == "assistant" else None
            self.messages.append(_each_text(message, partial(self._mark, author=author)))

    def find(self, marked: str) -> list[tuple[int, int, int | None]] | None:
        """Start, end and author of each text in a render, without the marks; `None` if marks are torn apart."""
        found, removed, opened, seen = [], 0, None, set()
        for mark in self.pattern.finditer(marked):
            number, place = int(mark[1]), mark.start() - removed
            removed += len(mark[0])
            if mark[2] == "\ue001" and opened is None:
                opened = number, place
            elif mark[2] == "\ue002" and opened is not None and opened[0] == number:
                found.append((opened[1], place, self.authors[number]))
                opened = None
                if number in seen and self.authors[number] is not None:
                    return None  # the template says an answer again, who knows as whose words
                seen.add(number)
            else:
                return None
        return found if opened is None else None

    def _mark(self, text: str, author) -> str:
        if author is None or not self.split or not TAGS.search(text):
            return self._mark_text(text, author)
        return _between_tags(text, partial(self._mark_text, author=author))

    def _mark_text(self, text: str, author) -> str:
        number, core = len(self.authors), text.strip() if self.inside else text
        self.authors.append(author)
        before, _, after = text.partition(core) if core else (text, "", "")
        return f"{before}\ue000{self.secret}{number}\ue001{core}\ue000{self.secret}{number}\ue002{after}"


def answer_mask(
    token_offsets: list[tuple[int, int]], replacements: list[dict], answers: list[tuple[int, int]]
) -> list[int]:
    """
    Which tokens of a prompt an assistant wrote: 1 for each token that overlaps one of `answers`, else 0.

    Args:
        token_offsets (`list[tuple[int, int]]`): Start and end of each token in the text that was encoded.
        replacements (`list[dict]`): What the base's processor put for each image token before it encoded the text:
            the token's `"span"` in the rendered prompt, and the `"new_span"` of what stands there now.
        answers (`list[tuple[int, int]]`): Start and end of each answer in the rendered prompt, in order.
    """
    places = [place["span"][1] for place in replacements]
    gained = [0, *(place["new_span"][1] - place["span"][1] for place in replacements)]

    def moved(character: int) -> int:
        return character + gained[bisect_right(places, character)]

    spans = [(moved(start), moved(end)) for start, end in answers if start < end]
    ends = [end for _, end in spans]
    mask = []
    for first, last in token_offsets:
        following = bisect_right(ends, first)  # the first answer that ends behind the token's start
        mask.append(int(following < len(spans) and last > spans[following][0]))
    return mask


def _answers(text: str, texts: list, lead: str, tail: str) -> list[tuple[int, int]]:
    """Each assistant's texts as one span, with the `lead` before them and the `tail` behind, where they are there."""
    answers, author = [], None
    for i, (start, end, by) in enumerate(texts):
        if by is not None:
            before = texts[i - 1][1] if i else 0
            following = texts[i + 1][0] if i + 1 < len(texts) else len(text)
            end += _shared(text[end:following], tail)
            if by == author:
                answers[-1] = (answers[-1][0], end)
            else:
                has_lead = text.endswith(lead, before, start)
                answers.append((start - len(lead) * has_lead, end))
        author = by
    return answers


def _around_an_answer(messages: list[dict], render) -> tuple[str, str]:
    """
    What the template writes before an answer, after its generation prompt (white space, an empty thought), and behind
    it (the turn's end). Seen at the chat's first answer.
    """
    turn = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    try:
        text = render(messages[: turn + 1])
        lead = _shared(text, render(messages[:turn], add_generation_prompt=True)) if turn else len(text)
    except Exception:  # a template may insist on what comes later in the chat
        return "", ""
    texts = find_texts(text, messages[: turn + 1], render)
    if not texts or texts[-1][2] is None:
        return "", ""
    start = min(start for start, _, author in texts if author is not None)
    asked = max((end for _, end, author in texts if author is None), default=0)
    return text[lead:start] if asked <= lead else "", text[texts[-1][1] :]


def _each_text(value, change: Callable[[str], str], field=None):
    """`value`, of a message, with `change` made to each text in it."""
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


def _check_tokens(text: str, texts, tokens: ControlTokens):
    """Raises if `text` has a control token that the template did not write."""
    places = sorted((start, end) for start, end, _ in texts if start < end)
    starts = [start for start, _ in places]
    for start, end in tokens.find(text):
        at = bisect_right(starts, end - 1) - 1  # the last text that starts before the token's end
        if at >= 0 and places[at][1] > start:
            raise ValueError(MADE_OF_TEXTS.format("chat template", text[start:end]))


def _count_tokens(text: str, messages: list[dict], render, tokens: ControlTokens, **flags):
    """Raises if `text` has a control token more often than the same chat with an x for each text."""
    harmless = [_each_text(message, partial(_between_tags, change=lambda piece: "x")) for message in messages]
    _compare_tokens(text, render(harmless, **flags), tokens, "chat template")


def _compare_tokens(text: str, harmless: str, tokens: ControlTokens, maker: str):
    counts = [Counter(prompt[start:end] for start, end in tokens.find(prompt)) for prompt in (text, harmless)]
    for token in counts[0] - counts[1]:
        raise ValueError(MADE_OF_TEXTS.format(maker, token))


def _shared(text: str, other: str) -> int:
    return len(os.path.commonprefix([text, other]))
