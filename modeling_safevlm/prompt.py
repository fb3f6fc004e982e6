"""A prompt: what it may hold, which of its tokens the safety head reads, how hints go in and placeholders go out.

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

logger = logging.get_logger(__name__)


def check_inputs(input_ids, pixel_ndims, pixel_values=None, inputs_embeds=None, mm_encoder_outputs=None, **kwargs):
    """
    Raises if a prompt does not come as token ids and pixels, which is what the safety head reads.

    Args:
        pixel_ndims (`tuple[int]`): How many dimensions the family's `pixel_values` may have.
    """
    if inputs_embeds is not None:
        raise ValueError(
            "`inputs_embeds` cannot be passed: the safety head reads the prompt's token ids. "
            "Pass `input_ids` (and `pixel_values`) from the processor."
        )
    if mm_encoder_outputs is not None:
        raise ValueError(
            "`mm_encoder_outputs` cannot be passed: the safety head needs the vision tower's features. "
            "Pass `pixel_values` from the processor."
        )
    for name, value in kwargs.items():
        if value is not None and ("video" in name or name == "input_features"):
            raise ValueError(f"`{name}` cannot be passed: the safety head reads images only, no video or sound.")
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        got = repr(input_ids)
        if isinstance(input_ids, torch.Tensor):
            got = f"a {input_ids.dtype} tensor of shape {tuple(input_ids.shape)}"
        raise ValueError(
            f"`input_ids` must be a tensor of token ids of shape (batch_size, sequence_length), got {got}."
        )
    if not input_ids.numel():
        raise ValueError(f"`input_ids` of shape {tuple(input_ids.shape)} holds no prompt: pass at least one token.")
    if pixel_values is None:
        return
    is_tensor = isinstance(pixel_values, torch.Tensor)
    if not is_tensor or pixel_values.ndim not in pixel_ndims or not pixel_values.numel():
        got = f"shape {tuple(pixel_values.shape)}" if is_tensor else f"a {type(pixel_values).__name__}"
        raise ValueError(
            f"`pixel_values` must be a tensor with {' or '.join(map(str, pixel_ndims))} dimensions and at least one "
            f'image, got {got}. Pass what the processor returns with `return_tensors="pt"`; leave it out if there are '
            f"no images."
        )


def check_attention(input_ids, attention_mask, image_token_id: int):
    """Raises for prompts of which the language model would see something that the head does not."""
    seen = attention_mask.bool()
    for row, tokens in enumerate(seen.any(dim=1).tolist()):
        if not tokens:  # attention over nothing is attention to everything
            raise ValueError(f"`attention_mask` hides all of row {row}: leave the row out, or attend to its tokens.")
    if (hidden := (input_ids == image_token_id) & ~seen).any():
        raise ValueError(
            f"`attention_mask` hides image tokens of row {int(hidden.any(dim=1).nonzero()[0])}: leave the image out, "
            f"or attend to it."
        )


def check_generation(call: dict, setting, image_inputs: tuple[str, ...], enabled: bool):
    """
    Raises for what cannot work under a policy.

    Args:
        setting (`Callable`): Gives a generation setting of the call, wherever it was made.
        image_inputs (`tuple[str]`): The arguments that describe images.
        enabled (`bool`): Whether the policy is.
    """
    if setting("cache_implementation", call) == "paged":
        raise ValueError("`cache_implementation='paged'` by-passes the safety head. Use 'dynamic' or 'static'.")
    if call.get("position_ids") is not None:
        raise ValueError(
            "`position_ids` cannot be passed to `generate`: hints and placeholders move tokens. Leave them out; they "
            "follow from `attention_mask`."
        )
    if enabled and setting("token_healing", call):
        raise ValueError("`token_healing` rewrites the prompt that the safety head has read: leave it out.")
    for name, value in call.items():
        if value is not None and ("image" in name or "pixel" in name) and name not in image_inputs:
            raise ValueError(f"`{name}` cannot be passed: the safety head would not see it. Pass `pixel_values`.")


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


def edit_prompt(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    per_token: dict[str, torch.Tensor] | None = None,
    insertions: list[list[int] | None] | None = None,
    columns: list[int] | None = None,
    drop_id: int | None = None,
    right: bool = False,
) -> dict[str, torch.Tensor]:
    """
    A left-padded batch of prompts with tokens inserted or dropped, row by row. What is inserted into is left-padded
    without masked tokens, whatever it was before.

    Args:
        input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`)
        per_token (`dict[str, torch.Tensor]`): More tensors of that shape; 0 at inserted and padded positions.
        insertions (`list[list[int] | None]`): Token ids to insert into each row.
        columns (`list[int]`): The column of `input_ids` before which each row's insertion goes (see [`hint_column`]).
        drop_id (`int`): Token id to drop everywhere.
        right (`bool`): Whether to pad on the right.

    Returns:
        `dict` with the edited `input_ids`, `attention_mask` and `per_token` tensors; those passed if nothing changes.
    """
    per_token = per_token or {}
    ragged = insertions is not None and bool((attention_mask[:, 1:] < attention_mask[:, :-1]).any())
    insertions = insertions or [None] * len(input_ids)
    columns = columns or [0] * len(input_ids)
    drops = drop_id is not None and bool((input_ids == drop_id).any())
    if not drops and not ragged and all(insertion is None for insertion in insertions):
        return {"input_ids": input_ids, "attention_mask": attention_mask, **per_token}

    rows = []
    for row, (insertion, column) in enumerate(zip(insertions, columns, strict=True)):
        keep = attention_mask[row].bool()
        if drops:
            keep = keep & (input_ids[row] != drop_id)
        kept = keep.nonzero().squeeze(1)
        rows.append((kept, int((kept < column).sum()), insertion or []))
    length = max(len(kept) + len(insertion) for kept, _, insertion in rows)

    def rebuild(tensor, padding, inserted):
        out = tensor.new_full((len(rows), length), padding)
        for row, (kept, at, insertion) in enumerate(rows):
            values = tensor[row, kept]
            middle = torch.tensor(insertion if inserted is None else [inserted] * len(insertion)).to(values)
            values = torch.cat([values[:at], middle, values[at:]])
            out[row, slice(len(values)) if right else slice(length - len(values), None)] = values
        return out

    # Padding is masked, so any id in the vocabulary will do; the row's own padding id keeps it recognisable.
    padded = input_ids[attention_mask == 0]
    return {
        "input_ids": rebuild(input_ids, int(padded[0]) if len(padded) else 0, None),
        "attention_mask": rebuild(attention_mask, 0, 1),
        **{name: rebuild(tensor, 0, 0) for name, tensor in per_token.items()},
    }


def per_token(call: dict, input_ids) -> dict[str, torch.Tensor]:
    """The call's tensors with one entry per prompt token (token types and the like), which move along with these."""
    tensors = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    return {
        name: value
        for name, value in tensors.items()
        if value.shape == input_ids.shape and "negative_prompt" not in name
    }


def hint_column(ids: list[int], mask: list[bool], generation_prompt: list[int]) -> int:
    """
    The column of a row before which a hint goes: the end of the newest turn's words, where the generation prompt
    starts.

    Args:
        ids (`list[int]`): The row.
        mask (`list[bool]`): Where the row is neither padding nor an assistant's text.
        generation_prompt (`list[int]`): What the template writes between the newest turn's words and an answer. The
            prompt may end with the first tokens of it only: without a generation prompt the turn's end is left, and
            behind an open tag of thoughts other text makes other tokens. In a prompt with none of it the hint goes
            to the end, before the beginning of the answer if there is one.
    """
    columns = [column for column, read in enumerate(mask) if read]
    for length in range(min(len(generation_prompt), len(columns)), 0, -1):
        if [ids[column] for column in columns[-length:]] == generation_prompt[:length]:
            return columns[-length]
    return columns[-1] + 1 if columns else 0


def open_answers(
    answers: list[list[int] | None], rows: list[list[int]], generation_prompt: list[int], opening: list[int]
) -> list[list[int] | None]:
    """
    `answers` that begin with `opening` (which closes the generation prompt's thoughts) where the prompt ends with the
    generation prompt. Behind the beginning of an answer there is nothing to close.

    Args:
        rows (`list[list[int]]`): Each row's prompt, without padding.
    """
    ends = [bool(generation_prompt) and row[-len(generation_prompt) :] == generation_prompt for row in rows]
    return [
        answer if answer is None or not end else opening + answer for answer, end in zip(answers, ends, strict=True)
    ]


def last_occurrence(ids: list[int], pattern: list[int]) -> int:
    """Index where `pattern` last starts in `ids`; the end of `ids` if it does not occur (or is empty)."""
    for start in range(len(ids) - len(pattern), -1, -1):
        if pattern and ids[start : start + len(pattern)] == pattern:
            return start
    return len(ids)
