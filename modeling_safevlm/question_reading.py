"""What the safety head reads of a prompt: questions, never answers, as in training.

A verdict is on the newest user turn, given the whole chat. So the head reads a conversation more than once, and the
worst verdict counts:

- every user turn, for a request that is spread over the chat (unless the policy's `whole_conversation` is false);
- the newest user turn by itself, which harmless turns before it must not dilute;
- the newest user turn with the beginning of the answer that the caller wrote ("Sure, here is how"), if there is one:
  such a text can hold the request. By itself it cannot make a request look harmless: the other two leave it out.

A prompt of one turn is read once.
"""

from dataclasses import dataclass

import torch
from transformers.utils import logging

from .prompt_editing import last_occurrence

logger = logging.get_logger(__name__)


@dataclass
class PromptParts:
    """
    Boolean masks of shape `(batch_size, sequence_length)`, `False` at padding.

    Args:
        questions: All that no assistant wrote.
        newest: Of `questions`, what comes after the last finished answer.
        prefill: The beginning of an answer that the caller wrote, at the prompt's end.
    """

    questions: torch.Tensor
    newest: torch.Tensor
    prefill: torch.Tensor

    def readings(self, whole_conversation: bool = True) -> list[torch.Tensor]:
        """What the head shall read, each reading once. See [`SafetyPolicy`] on `whole_conversation`."""
        readings = []
        for reading in (*[self.questions] * whole_conversation, self.newest, self.newest | self.prefill):
            if not any(torch.equal(reading, other) for other in readings):
                readings.append(reading)
        return readings


def prompt_parts(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    question_mask: torch.Tensor | None,
    generation_prompt: list[int],
) -> PromptParts:
    """
    Args:
        question_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): The processor's
            `safety_question_mask`. It can hide answers only: what does not follow the opening of an assistant's turn
            is read whatever it says. Without it, only the beginning of an answer can be told from the rest: what comes
            after the last `generation_prompt`. Where answers of earlier turns end, token ids do not say.
    """
    seen = attention_mask.bool()
    if question_mask is None:
        questions = _before_the_answer(input_ids, seen, generation_prompt)
    elif question_mask.shape != input_ids.shape:
        raise ValueError(
            f"`safety_question_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, "
            f"got {tuple(question_mask.shape)}."
        )
    else:
        questions = seen & question_mask.bool().to(seen.device)
        questions |= _hidden_without_an_opening(input_ids, seen, questions, generation_prompt)
    answers = seen & ~questions
    columns = torch.arange(input_ids.shape[1], device=seen.device)
    end = torch.where(questions, columns, -1).amax(dim=1, keepdim=True)  # the last question token
    prefill = answers & (columns > end)
    start = torch.where(answers & (columns < end), columns, -1).amax(dim=1, keepdim=True)
    return PromptParts(questions, questions & (columns > start), prefill)


def _hidden_without_an_opening(input_ids, seen, questions, generation_prompt):
    """
    Spans that a mask hides though no assistant's turn opens before them: `generation_prompt`, or more than the
    first half of it (in earlier turns templates leave out what opens thoughts).
    """
    hidden = torch.zeros_like(seen)
    if not generation_prompt or torch.equal(seen, questions):
        return hidden
    lengths = range(len(generation_prompt), len(generation_prompt) // 2, -1)
    for row, mask in enumerate(seen):
        columns = mask.nonzero().squeeze(1)
        ids, asked = input_ids[row, columns].tolist(), questions[row, columns].tolist()
        opened = False
        for at, column in enumerate(columns.tolist()):
            if not asked[at] and (at == 0 or asked[at - 1]):
                opened = any(ids[max(at - n, 0) : at] == generation_prompt[:n] for n in lengths)
            hidden[row, column] = not asked[at] and not opened
    if hidden.any():
        logger.warning_once(
            "`safety_question_mask` hides text that no assistant wrote; the safety head reads it all the same. Pass "
            "the mask that the processor returns."
        )
    return hidden


def _before_the_answer(input_ids, seen, generation_prompt):
    """`seen` without what comes after each row's last generation prompt."""
    questions = seen.clone()
    if not generation_prompt:
        return questions
    for row, mask in enumerate(seen):
        columns = mask.nonzero().squeeze(1)
        ids = input_ids[row, columns].tolist()
        at = last_occurrence(ids, generation_prompt)
        if last_occurrence(ids[:at], generation_prompt) < at:
            logger.warning_once(
                "A prompt of several turns came without `safety_question_mask`: the safety head reads the answers in "
                "it as if they were questions. Pass all that the processor returns for "
                "`processor.apply_chat_template(messages, ...)`."
            )
        questions[row, columns[at + len(generation_prompt) :]] = False
    return questions
