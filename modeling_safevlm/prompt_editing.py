"""Moves tokens about in a batch of prompts: hints go in, placeholders go out."""

import torch


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
