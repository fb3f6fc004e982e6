"""Prompts: what they may hold, which of their tokens the safety head reads, and where hints go.

The verdict is on the newest user turn in the context of the whole chat. The head reads a conversation up to three
times, and the strictest verdict counts:

- all user turns, to catch a request that is spread over the chat (unless the policy's `whole_conversation` is false);
- the newest user turn alone, so that earlier harmless turns do not dilute it;
- the newest user turn with the beginning of the answer, if the caller wrote one ("Sure, here is how"). Such a text can
  hold the request, but it cannot make one look harmless, because the other readings leave it out.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

# -- what a prompt may hold ------------------------------------------------------------------------------------------


def check_inputs(input_ids, pixel_ndims: tuple[int, ...], pixel_values=None, **kwargs):
    """
    Raises unless the prompt comes as token ids and pixels, which the safety head can read.

    Args:
        pixel_ndims (`tuple[int]`): How many dimensions the family's `pixel_values` may have.
    """
    for name, value in kwargs.items():
        if value is None:
            continue
        if name == "inputs_embeds":
            reason = "reads the prompt's token ids. Pass `input_ids` (and `pixel_values`) from the processor"
        elif name == "mm_encoder_outputs":
            reason = "needs the vision tower's features. Pass `pixel_values` from the processor"
        elif "video" in name or name == "input_features":
            reason = "reads images only, no video or sound"
        else:
            continue
        raise ValueError(f"`{name}` cannot be passed: the safety head {reason}.")
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        is_tensor = isinstance(input_ids, torch.Tensor)
        got = f"a {input_ids.dtype} tensor of shape {tuple(input_ids.shape)}" if is_tensor else repr(input_ids)
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
    """Raises if `attention_mask` hides a whole row or an image: head and language model would not see the same."""
    seen = attention_mask.bool()
    hides_image = ((input_ids == image_token_id) & ~seen).any(dim=1)
    for row, (sees_any, hides) in enumerate(zip(seen.any(dim=1).tolist(), hides_image.tolist(), strict=True)):
        if not sees_any:  # attention to nothing is computed as attention to everything
            raise ValueError(f"`attention_mask` hides all of row {row}: leave the row out, or attend to its tokens.")
        if hides:
            raise ValueError(
                f"`attention_mask` hides image tokens of row {row}: leave the image out, or attend to it."
            )


def check_generation(call: dict, setting, image_inputs: tuple[str, ...], enabled: bool):
    """
    Raises for arguments of `generate` that would bypass the policy.

    Args:
        call (`dict`): The arguments.
        setting (`Callable`): `setting(name, call)` gives a generation setting, from the call or the model's config.
        image_inputs (`tuple[str]`): The family's arguments that describe images.
        enabled (`bool`): Whether the policy is enabled.
    """
    if setting("cache_implementation", call) == "paged":
        raise ValueError("`cache_implementation='paged'` bypasses the safety head. Use 'dynamic' or 'static'.")
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


# -- what the head reads ---------------------------------------------------------------------------------------------


@dataclass
class PromptParts:
    """
    Args:
        questions (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): Every token not written by the
            assistant, without padding.
        newest (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): The questions after the last finished
            answer.
        prefill (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): The beginning of an answer that the
            caller wrote at the end of the prompt.
        hint_columns (`list[int]`): The column before which each row's hint goes, see [`hint_column`].
        at_answer (`list[bool]`): Whether each row ends with the whole generation prompt.
    """

    questions: torch.Tensor
    newest: torch.Tensor
    prefill: torch.Tensor
    hint_columns: list[int]
    at_answer: list[bool]

    def readings(self, whole_conversation: bool = True) -> list[torch.Tensor]:
        """The masks under which the head reads the prompts, each once; the top of this file explains them."""
        masks = [self.questions] if whole_conversation else []
        masks += [self.newest, self.newest | self.prefill]
        return [mask for i, mask in enumerate(masks) if not any(torch.equal(mask, earlier) for earlier in masks[:i])]

    def open_answers(self, answers: list[list[int] | None], opening: list[int]) -> list[list[int] | None]:
        """
        Puts `opening`, which closes the generation prompt's thoughts, in front of `answers`. Where the caller began
        the answer there is nothing to close.
        """
        rows = zip(answers, self.at_answer, strict=True)
        return [opening + answer if answer and at_answer else answer for answer, at_answer in rows]


def prompt_parts(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    question_mask: torch.Tensor | None,
    generation_prompt: list[int],
) -> PromptParts:
    """
    Args:
        question_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): The processor's
            `safety_question_mask`. Without it everything before the last `generation_prompt` counts as a question,
            because token ids do not show where the answers of earlier turns end.
        generation_prompt (`list[int]`): The configuration's `generation_prompt_token_ids`.
    """
    if question_mask is not None and question_mask.shape != input_ids.shape:
        raise ValueError(
            f"`safety_question_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, "
            f"got {tuple(question_mask.shape)}."
        )
    seen = attention_mask.bool()
    questions, at_answer = torch.zeros_like(seen), []
    for row, mask in enumerate(seen):
        columns = mask.nonzero().squeeze(1)
        ids = input_ids[row, columns].tolist()
        if question_mask is None:
            is_question = _questions_without_mask(ids, generation_prompt)
        else:
            is_question = question_mask[row, columns.to(question_mask.device)].bool().tolist()
            is_question = _questions_with_mask(ids, is_question, generation_prompt)
        questions[row, columns] = torch.tensor(is_question, dtype=torch.bool, device=seen.device)
        at_answer.append(0 < len(generation_prompt) == _tail_length(ids, generation_prompt))
    answers = seen & ~questions
    columns = torch.arange(input_ids.shape[1], device=seen.device)
    last_question = torch.where(questions, columns, -1).amax(dim=1, keepdim=True)
    last_answer = torch.where(answers & (columns < last_question), columns, -1).amax(dim=1, keepdim=True)
    rows = zip(input_ids.tolist(), questions.tolist(), strict=True)
    return PromptParts(
        questions,
        newest=questions & (columns > last_answer),
        prefill=answers & (columns > last_question),
        hint_columns=[hint_column(ids, mask, generation_prompt) for ids, mask in rows],
        at_answer=at_answer,
    )


def _questions_without_mask(ids: list[int], generation_prompt: list[int]) -> list[bool]:
    """Every token up to the end of the last generation prompt; all of them if there is none."""
    start = last_occurrence(ids, generation_prompt)
    if last_occurrence(ids[:start], generation_prompt) < start:
        logger.warning_once(
            "A prompt of several turns came without `safety_question_mask`, so the safety head reads the answers in "
            "it as questions. Pass everything that `processor.apply_chat_template(messages, ...)` returns."
        )
    return [position < start + len(generation_prompt) for position in range(len(ids))]


def _questions_with_mask(ids: list[int], mask: list[bool], generation_prompt: list[int]) -> list[bool]:
    """
    The mask's questions, and every text that it hides although no assistant's turn opens right before: a caller's mask
    can hide answers only.
    """
    if not generation_prompt:
        return mask
    questions, is_answer = [], None
    for position, is_question in enumerate(mask):
        if is_question:
            is_answer = None
        elif is_answer is None:  # a hidden text begins
            # In earlier turns templates leave out the end of the generation prompt, such as an open tag of thoughts.
            is_answer = _tail_length(ids[:position], generation_prompt) > len(generation_prompt) // 2
        questions.append(not is_answer)
    if questions != mask:
        logger.warning_once(
            "`safety_question_mask` hides text that the assistant did not write; the safety head reads it anyway. "
            "Pass the mask that the processor returns."
        )
    return questions


def hint_column(ids: list[int], mask: list[bool], generation_prompt: list[int]) -> int:
    """
    The column before which a row's hint goes: the end of the newest turn's text, where the generation prompt begins.

    The prompt may hold only the first tokens of the generation prompt: with `add_generation_prompt=False` it stops at
    the end of the turn, and text after an open tag of thoughts can change the tag's last token. If none of them are
    there, the hint goes after the last question token.

    Args:
        ids, mask (`list` of length `sequence_length`): The row's tokens, and which of them are questions.
    """
    columns = [column for column, is_question in enumerate(mask) if is_question]
    if length := _tail_length([ids[column] for column in columns], generation_prompt):
        return columns[-length]
    return columns[-1] + 1 if columns else 0


def last_occurrence(ids: list[int], pattern: list[int]) -> int:
    """Where `pattern` last starts in `ids`; the end of `ids` if it does not occur (or is empty)."""
    for start in range(len(ids) - len(pattern), -1, -1):
        if pattern and ids[start : start + len(pattern)] == pattern:
            return start
    return len(ids)


def _tail_length(ids: list[int], pattern: list[int]) -> int:
    """How many of the first tokens of `pattern` stand at the end of `ids`."""
    lengths = range(min(len(pattern), len(ids)), 0, -1)
    return next((length for length in lengths if ids[-length:] == pattern[:length]), 0)


# -- inserting and dropping tokens -----------------------------------------------------------------------------------


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
    Inserts tokens into a batch of prompts, or drops some. With `insertions` the result is left-padded and has no
    masked tokens within a prompt.

    Args:
        input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`)
        per_token (`dict[str, torch.Tensor]`): Further tensors of that shape; 0 at inserted and padded positions.
        insertions (`list[list[int] | None]`): Token ids to insert into each row.
        columns (`list[int]`): The column of `input_ids` before which each row's insertion goes.
        drop_id (`int`): Token id to drop everywhere.
        right (`bool`): Whether to pad on the right.

    Returns:
        `dict` with `input_ids`, `attention_mask` and the `per_token` tensors, the very ones passed if nothing changes.
    """
    tensors = {"input_ids": input_ids, "attention_mask": attention_mask, **(per_token or {})}
    ragged = insertions is not None and bool((attention_mask[:, 1:] < attention_mask[:, :-1]).any())
    drops = drop_id is not None and bool((input_ids == drop_id).any())
    insertions, columns = insertions or [None] * len(input_ids), columns or [0] * len(input_ids)
    if not (ragged or drops or any(insertions)):
        return tensors
    keep = attention_mask.bool() & (input_ids != drop_id) if drops else attention_mask.bool()

    def rebuild(name, tensor):
        padding, rows = 0, []
        if name == "input_ids" and not attention_mask.all():
            # Padding is masked, so any id will do; the batch's own is easiest to recognise.
            padding = int(input_ids[attention_mask == 0][0])
        for row, (insertion, at) in enumerate(zip(insertions, columns, strict=True)):
            inserted = insertion or []
            if name != "input_ids":
                inserted = [int(name == "attention_mask")] * len(inserted)
            before, after = tensor[row, :at][keep[row, :at]], tensor[row, at:][keep[row, at:]]
            rows.append(torch.cat([before, tensor.new_tensor(inserted), after]))
        return nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=padding, padding_side="right" if right else "left"
        )

    return {name: rebuild(name, tensor) for name, tensor in tensors.items()}


def per_token(call: dict, input_ids) -> dict[str, torch.Tensor]:
    """The call's tensors with one entry per prompt token (token types and the like), which move with the tokens."""
    return {
        name: value
        for name, value in call.items()
        if isinstance(value, torch.Tensor) and value.shape == input_ids.shape and "negative_prompt" not in name
    }
