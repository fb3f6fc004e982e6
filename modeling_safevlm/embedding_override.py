"""Puts safety embeddings into the base model's input, whatever the family does with its embeddings afterwards.

One forward hook on the base's token embedding replaces the vectors at `<safety>` placeholders. Passing `inputs_embeds`
instead would lose what families derive from token ids (M-RoPE positions, token types). What to place lives in a
`threading.local`, so that concurrent calls on one model cannot mix (a `ContextVar` would do, too, but `torch.compile`
cannot trace it).
"""

import threading
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class EmbeddingOverride:
    """
    Args:
        embedding (`nn.Module`): The embedding module that this override is meant for.
        values (`torch.FloatTensor` of shape `(num_placeholders, hidden_size)`)
        token_id (`int`): The placeholder's; no other token is ever replaced.
        slots (`torch.LongTensor` of shape `(batch_size, prompt_length)`): Index into `values`, or -1.
        placed (`torch.LongTensor` of shape `(num_placeholders,)`): How often each value was placed.
        used (`bool`): Whether the base ran.
        start (`int`): What a cache held before the prompt's first token.
        offset (`int` or scalar `torch.LongTensor`): Prompt position of the first token that the embedding sees next.
            It moves on in chunked prefill. Static caches give a tensor, which is never read back to the host.
    """

    embedding: nn.Module
    values: torch.Tensor
    token_id: int
    slots: torch.Tensor
    placed: torch.Tensor
    used: bool = False
    start: int = 0
    offset: int | torch.Tensor = 0


class _Active(threading.local):
    override: EmbeddingOverride | None = None


_ACTIVE = _Active()


def placeholder_slots(input_ids: torch.Tensor, safety_token_id: int) -> torch.Tensor:
    """Numbers the placeholders of `input_ids` row by row: shape of `input_ids`, -1 elsewhere."""
    mask = input_ids == safety_token_id
    return torch.where(mask, mask.flatten().cumsum(0).view_as(mask) - 1, -1)


@contextmanager
def override_embeddings(
    base: nn.Module,
    values: torch.Tensor | None,
    input_ids: torch.Tensor,
    token_id: int | None,
    num_cached: int = 0,
    start: int = 0,
):
    """
    Inside this context the base's token embedding returns `values` at the placeholders of the prompt `input_ids`, and
    nothing else: what an outer context places (this one may be opened by a logits processor) waits for its end.

    Args:
        values (`torch.FloatTensor` of shape `(num_placeholders, hidden_size)`, *optional*): In the order of the
            prompt's rows.
        token_id (`int`): The placeholder's.
        num_cached (`int`): How many of the prompt's tokens a cache holds already.
        start (`int`): How many tokens a cache holds that come before the prompt.

    Raises:
        `RuntimeError`: The base ran, and a placeholder went through without its embedding.
    """
    before, override = _ACTIVE.override, None
    if values is not None and len(values):
        _install_hooks(base)
        slots = placeholder_slots(input_ids, token_id)
        placed = torch.zeros(len(values), dtype=torch.long, device=slots.device)
        override = EmbeddingOverride(base.get_input_embeddings(), values, token_id, slots, placed, start=start)
    _ACTIVE.override = override
    try:
        yield
    finally:
        _ACTIVE.override = before
    if override is not None and override.used:
        expected = slots[:, num_cached:]
        missing = int((override.placed[expected[expected >= 0]] == 0).sum())
        if missing:
            raise RuntimeError(
                f"{missing} of {len(values)} safety embeddings did not reach the base model's input: something else "
                f"computes its embeddings. Call the SafeVLM's `generate` or `forward`, with the base as it was loaded."
            )


def _install_hooks(base: nn.Module):
    """Once per module; the embedding may be another one than last time (after a resize, say)."""
    embedding = base.get_input_embeddings()
    # Another copy of this code (a model's own beside the package's) has hooks of its own, which know nothing of ours.
    if _note_offset not in base._forward_pre_hooks.values():
        base.register_forward_pre_hook(_note_offset, with_kwargs=True)
    if _replace_placeholders not in embedding._forward_hooks.values():
        embedding.register_forward_hook(_replace_placeholders)


def _note_offset(base, args, kwargs):
    override = _ACTIVE.override
    if override is not None and override.embedding is base.get_input_embeddings():
        cache = kwargs.get("past_key_values")
        override.used = True
        override.offset = 0 if cache is None else cache.get_seq_length() - override.start


def _replace_placeholders(embedding, args, output):
    override = _ACTIVE.override
    if override is None or override.embedding is not embedding or output.ndim != 3:
        return output
    offset, slots = override.offset, override.slots.to(output.device)
    prompt_length = slots.shape[1]
    if isinstance(offset, int) and offset >= prompt_length:  # decoding: every placeholder is in the cache already
        return output
    if output.shape[0] % slots.shape[0]:  # somebody's own pass over other rows
        return output
    columns = offset + torch.arange(output.shape[1], device=output.device)
    # Tokens after the prompt are no placeholders; beams and several sequences per prompt repeat each row.
    slots = torch.where(columns < prompt_length, slots[:, columns.clamp(max=prompt_length - 1)], -1)
    slots = slots.repeat_interleave(output.shape[0] // slots.shape[0], dim=0)
    values = override.values.to(output.device, output.dtype)
    # Passes over other tokens at these positions (classifier-free guidance has its own cache) keep their embeddings.
    placed = (slots >= 0) & (args[0].to(output.device) == override.token_id)
    slots = slots.clamp(min=0)
    counts = override.placed
    override.placed = counts.index_add(0, slots.flatten().to(counts.device), placed.flatten().to(counts))
    return torch.where(placed.unsqueeze(-1), values[slots], output)
