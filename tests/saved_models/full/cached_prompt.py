"""Carrying a chat on from a cache: used as far as it holds what the prompt says, under the same verdict.

A cache made by `generate` remembers what is in it. In the next turn it is cut where that stops being true: at a hint
that this turn's prompt does not have, or at safety embeddings that were conditioned on another verdict. What was cut
is processed again, so that an answer with a cache is the answer without it.
"""

from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicLayer


@dataclass
class CachedPrompt:
    """
    What a cache holds.

    Args:
        input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, length)`)
        verdicts (`list`): Of each row, the action and category that its safety embeddings are conditioned on.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    verdicts: list[tuple[int, int]]


def remember_prompt(
    cache, sequences: torch.Tensor, attention_mask: torch.Tensor, verdicts: list[tuple[int, int]], num_beams: int
):
    """
    Notes in `cache` what it holds.

    Args:
        sequences (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Prompt and answer.
        attention_mask (`torch.LongTensor` of shape `(batch_size, prompt_length)`)
        num_beams (`int`): Of several beams a cache holds those that were last in the running, not those returned.
    """
    length = int(cache.get_seq_length())
    if num_beams > 1 or len(sequences) != len(attention_mask):
        sequences, attention_mask = sequences[:0], attention_mask[:0]  # fits no prompt
    answer = sequences.shape[1] - attention_mask.shape[1]
    mask = torch.cat([attention_mask, attention_mask.new_ones(len(attention_mask), answer)], dim=1)
    cache.safevlm_prompt = CachedPrompt(sequences[:, :length].clone(), mask[:, :length], verdicts)


def reuse_cache(
    cache, input_ids: torch.Tensor, attention_mask: torch.Tensor, verdicts: list[tuple[int, int]], token_id: int | None
) -> int:
    """
    Cuts `cache` down to what it has in common with a prompt.

    Args:
        token_id (`int`, *optional*): The safety placeholder's.

    Returns:
        `int`: How many of the prompt's tokens the cache holds.

    Raises:
        `ValueError`: The prompt is shorter than a cache that something else than `generate` made.
    """
    if cache is None or (length := int(cache.get_seq_length())) == 0:
        return 0
    known = vars(cache).pop("safevlm_prompt", None)  # no longer true once tokens are added; noted again afterwards
    placeholders = input_ids == token_id if token_id is not None else torch.zeros_like(input_ids, dtype=torch.bool)
    if known is None:
        if length >= input_ids.shape[1]:
            raise ValueError(
                f"`past_key_values` holds {length} tokens and `input_ids` only {input_ids.shape[1]}: pass the whole "
                f"conversation's `input_ids` and images, as the safety head reads all of it."
            )
        # Nobody knows which verdict its safety embeddings are conditioned on.
        same = ~placeholders[:, :length]
    elif len(known.input_ids) != len(input_ids):
        same = torch.zeros_like(placeholders)
    else:
        length = min(length, input_ids.shape[1] - 1)  # something must be left to process
        same = (known.input_ids[:, :length] == input_ids[:, :length]) & (
            known.attention_mask[:, :length] == attention_mask[:, :length]
        )
        for row, verdict in enumerate(verdicts):
            if verdict != known.verdicts[row]:
                same[row] &= ~placeholders[row, :length]
    keep = int(same.all(dim=0).int().cumprod(dim=0).sum())
    surplus = int(cache.get_seq_length()) - keep
    if surplus and keep and all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.crop(-surplus)
    elif surplus:  # sliding windows, static and quantised caches cannot go back
        cache.reset()
        keep = 0
    return keep


def uncached_features(mm_encoder_outputs: dict, config, input_ids: torch.Tensor, num_cached: int) -> dict:
    """
    Of pre-encoded images, what the tokens after the first `num_cached` need; empty if they need none.

    Args:
        mm_encoder_outputs (`dict`): Per modality an output whose `pooler_output` (and `deepstack_features`) have, all
            in all, one vector per placeholder token of `input_ids`, in order.
        config: The base model's; gives the placeholder's id.
    """
    if not num_cached:
        return mm_encoder_outputs
    needed = {}
    for modality, output in mm_encoder_outputs.items():
        mask = input_ids == getattr(config, f"{modality}_token_id")
        index = (mask.flatten().cumsum(0).view_as(mask) - 1)[:, num_cached:]
        rows = [row[at] for row, at in zip(index, mask[:, num_cached:], strict=True)]
        rows = [row for row in rows if len(row)]
        if not rows:
            continue
        fields = {"pooler_output": _select(output["pooler_output"], rows)}
        if output.get("deepstack_features") is not None:
            fields["deepstack_features"] = [_select(layer, rows) for layer in output["deepstack_features"]]
        needed[modality] = type(output)(**fields)
    return needed


def _select(features, rows: list[torch.Tensor]):
    """The vectors of each row of the batch, in the container that `features` came in."""
    vectors = torch.cat([feature.reshape(-1, feature.shape[-1]) for feature in features])
    selected = [vectors[row.to(vectors.device)] for row in rows]
    return torch.stack(selected) if isinstance(features, torch.Tensor) else selected
