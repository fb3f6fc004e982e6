"""Puts safety embeddings into the base model's input, whatever the family does with its embeddings afterwards.

A forward hook on the base's token embedding replaces the vectors at `<safety>` placeholders. Passing `inputs_embeds`
instead would lose what families derive from token ids (M-RoPE positions, token types). The values are held in a
`threading.local`, so concurrent calls on one model cannot mix. (`torch.compile` cannot trace a `ContextVar`.)
"""

import threading
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class EmbeddingOverride:
    """
    Args:
        embedding (`nn.Module`): The embedding module whose output is overridden.
        values (`torch.FloatTensor` of shape `(num_placeholders, hidden_size)`)
        token_id (`int`): The placeholder's; no other token is ever replaced.
        slots (`torch.LongTensor` of shape `(batch_size, length + 1)`): Index into `values`, or -1, per position of
            cache and prompt. The last column, all -1, stands for every later position.
        counts (`torch.LongTensor` of shape `(num_placeholders,)`): How often each value was put in.
        offset (`int` or scalar `torch.LongTensor`): Position of the first token of the base's current pass. Static
            caches give a tensor, which is never read back to the host.
        used (`bool`): Whether the base ran.
    """

    embedding: nn.Module
    values: torch.Tensor
    token_id: int
    slots: torch.Tensor
    counts: torch.Tensor
    offset: int | torch.Tensor = 0
    used: bool = False


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
    In this context the base's token embedding returns `values` at the placeholders of the prompt `input_ids`. An outer
    context is suspended meanwhile: a logits processor may open one inside another.

    Args:
        values (`torch.FloatTensor` of shape `(num_placeholders, hidden_size)`, *optional*): In the order of the
            prompt's rows.
        token_id (`int`, *optional*): The placeholder's.
        num_cached (`int`): How many of the prompt's tokens a cache already holds.
        start (`int`): How many tokens before the prompt a cache holds.

    Raises:
        `RuntimeError`: The base ran, and a placeholder did not get its embedding.
    """
    outer, override = _ACTIVE.override, None
    if values is not None and len(values):
        _install_hooks(base)
        slots = F.pad(placeholder_slots(input_ids, token_id), (start, 1), value=-1)
        counts = torch.zeros(len(values), dtype=torch.long, device=slots.device)
        override = EmbeddingOverride(base.get_input_embeddings(), values, token_id, slots, counts)
    _ACTIVE.override = override
    try:
        yield
    finally:
        _ACTIVE.override = outer
    if override is not None and override.used:
        expected = slots[:, start + num_cached :]
        missing = int((override.counts[expected[expected >= 0]] == 0).sum())
        if missing:
            raise RuntimeError(
                f"{missing} of {len(values)} safety embeddings did not reach the base model's input: other code "
                f"computes its embeddings. Call the SafeVLM's `generate` or `forward`, with the base as it was loaded."
            )


def _install_hooks(base: nn.Module):
    """Once per module. The embedding may be a new one since the last call, after a resize for example."""
    embedding = base.get_input_embeddings()
    # Another copy of this code (a model's own beside the package's) has its own hooks, which do not see our override.
    if _record_offset not in base._forward_pre_hooks.values():
        base.register_forward_pre_hook(_record_offset, with_kwargs=True)
    if _replace_placeholders not in embedding._forward_hooks.values():
        embedding.register_forward_hook(_replace_placeholders)


def _record_offset(base, args, kwargs):
    override = _ACTIVE.override
    if override is not None and override.embedding is base.get_input_embeddings():
        cache = kwargs.get("past_key_values")
        override.offset, override.used = 0 if cache is None else cache.get_seq_length(), True


def _replace_placeholders(embedding, args, output):
    override = _ACTIVE.override
    if override is None or override.embedding is not embedding or output.ndim != 3:
        return output
    offset, slots = override.offset, override.slots.to(output.device)
    end = slots.shape[1] - 1
    if isinstance(offset, int) and offset >= end:  # decoding: the cache holds every placeholder
        return output
    if output.shape[0] % len(slots):  # a pass of other code over other rows
        return output
    columns = offset + torch.arange(output.shape[1], device=output.device)
    slots = slots[:, columns.clamp(max=end)]
    # Beams and several sequences per prompt repeat each row: (batch_size * copies, length)
    slots = slots.repeat_interleave(output.shape[0] // len(slots), dim=0)
    # Passes over other tokens at these positions (classifier-free guidance has its own cache) keep their embeddings.
    replaced = (slots >= 0) & (args[0].to(output.device) == override.token_id)
    slots, counts = slots.clamp(min=0), override.counts
    override.counts = counts.index_add(0, slots.flatten().to(counts.device), replaced.flatten().to(counts))
    return torch.where(replaced.unsqueeze(-1), override.values.to(output.device, output.dtype)[slots], output)
