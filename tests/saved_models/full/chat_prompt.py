"""A rendered chat that remembers what an assistant wrote in it, and what the safety head may read.

The safety head reads questions, never answers. Which is which follows from the chat's messages only: text cannot be
trusted to tell, as a user can spell any role marker. So a rendered prompt carries the places of its answers along.
"""

import os
from collections.abc import Callable


class ChatPrompt(str):
    """
    A prompt rendered by the chat template. Any string operation turns it into a plain `str`, without `answers`.

    Args:
        answers (`list[tuple[int, int]]`): Start and end of what assistant messages became, in characters.
    """

    answers: list[tuple[int, int]]

    def __new__(cls, text: str, answers: list[tuple[int, int]]):
        prompt = super().__new__(cls, text)
        prompt.answers = answers
        return prompt


def find_answers(text: str, messages: list[dict], render: Callable[..., str]) -> list[tuple[int, int]]:
    """
    Where the assistant's messages are in a rendered chat: from the end of their generation prompt to the end of their
    turn. A message that the prompt ends in (a beginning of an answer, to be continued) counts, too.

    Args:
        text (`str`): `messages` as rendered.
        render (`Callable`): Renders other messages in the same way: `render(messages, add_generation_prompt=False)`.
    """
    answers = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _shared(text, render(messages[:turn], add_generation_prompt=True)) if turn else 0
        end = len(text) if turn == len(messages) - 1 else _shared(text, render(messages[: turn + 1]))
        answers.append((start, end))
    return answers


def answer_mask(
    token_offsets: list[tuple[int, int]], replacements: list[dict], answers: list[tuple[int, int]]
) -> list[int]:
    """
    Which tokens of a prompt an assistant wrote: 1 for each token that overlaps one of `answers`, else 0.

    Args:
        token_offsets (`list[tuple[int, int]]`): Start and end of each token in the text that was encoded.
        replacements (`list[dict]`): What the base's processor put for each image token before it encoded the text:
            the token's `"span"` in the rendered prompt, and the `"new_span"` of what stands there now.
        answers (`list[tuple[int, int]]`): Start and end of each answer in the rendered prompt.
    """

    def moved(character: int) -> int:
        gained = [place["new_span"][1] - place["span"][1] for place in replacements if place["span"][1] <= character]
        return character + (gained[-1] if gained else 0)

    spans = [(moved(start), moved(end)) for start, end in answers]
    return [int(any(first < end and last > start for start, end in spans)) for first, last in token_offsets]


def _shared(text: str, prefix: str) -> int:
    return len(os.path.commonprefix([text, prefix]))
