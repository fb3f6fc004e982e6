"""Carrying a chat on from a cache: used as far as it holds what the prompt says, about the same pictures and verdicts.

A cache made by `generate` remembers what is in it. In the next turn it is cut where that stops being true: at a hint
that this turn's prompt does not have, at a picture that is another one, or at safety embeddings that were conditioned
on another verdict. What was cut is processed again, so that an answer with a cache is the answer without it. A cache
of which that is not known (made or changed by something else, or left behind by an error) is emptied.
"""

import hashlib
import secrets
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, DynamicLayer

_KEY = secrets.token_bytes(16)  # nobody can make two pictures for one digest whose key they do not know
UNKNOWN = -1  # the digest of a picture that nobody looked at: it equals none


@dataclass
class CachedPrompt:
    """
    What a cache holds.

    Args:
        input_ids, attention_mask (`torch.LongTensor` of shape `(batch_size, length)`)
        pictures (`torch.LongTensor` of shape `(batch_size, length)`): See [`picture_digests`].
        verdicts (`list`): Of each row, the action and category that its safety embeddings are conditioned on.
        seal (`tuple`): Of the cache's state (see [`_seal`]): whoever else adds, cuts or reorders breaks it.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    pictures: torch.Tensor
    verdicts: list[tuple[int, int]]
    seal: tuple


def picture_digests(input_ids: torch.Tensor, image_token_id: int, units: list[tuple] | None, tokens: list[int] | None):
    """
    Which picture each token stands for: shape of `input_ids`, 0 where it stands for none.

    Args:
        units (`list[tuple[torch.Tensor]]`, *optional*): The image tensors of each unit (see [`Backbone`]).
        tokens (`list[int]`, *optional*): How many image tokens each unit takes.
    """
    is_image = input_ids == image_token_id
    digests = torch.where(is_image, UNKNOWN, 0)
    if units is not None and len(units) == len(tokens) and sum(tokens) == int(is_image.sum()):
        ids = torch.tensor([_digest(unit) for unit in units], device=input_ids.device)
        digests[is_image] = ids.repeat_interleave(torch.tensor(tokens, device=input_ids.device))
    return digests


def _digest(tensors: tuple) -> int:
    """Of the tensors' bytes; positive."""
    digest = hashlib.blake2b(digest_size=8, key=_KEY)
    for tensor in map(torch.as_tensor, tensors):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return (int.from_bytes(digest.digest(), "big") >> 1) + 1


def _seal(cache) -> tuple[torch.Tensor | None, int | None]:
    """
    The keys of the cache's first attention layer, and how often they were written to. With each token a layer gets new
    keys, or writes to those that it has. So the seal of a cache, or of its copy, is broken by whatever changes it.
    """
    for layer in cache.layers:
        if isinstance(keys := getattr(layer, "keys", None), torch.Tensor):
            written = 0 if isinstance(layer, DynamicLayer) else None if keys.is_inference() else keys._version
            return keys, written
    return None, None


def _is_sealed(cache, known: CachedPrompt) -> bool:
    keys, written = _seal(cache)
    return keys is not None and keys is known.seal[0] and written is not None and written == known.seal[1]


def remember_prompt(
    cache,
    sequences: torch.Tensor,
    attention_mask: torch.Tensor,
    pictures: torch.Tensor,
    verdicts: list[tuple[int, int]],
    knowable: bool,
):
    """
    Notes in `cache` what it holds.

    Args:
        sequences (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Prompt and answer.
        attention_mask, pictures (`torch.LongTensor` of shape `(batch_size, prompt_length)`)
        knowable (`bool`): `False` for several beams (a cache holds those that were last in the running, not those
            returned), and for bases that read a prompt in both directions (a longer one changes all of it).
    """
    cache.safevlm_prompt = None
    if not knowable or len(sequences) != len(attention_mask):
        return
    answer = attention_mask.new_zeros(len(attention_mask), sequences.shape[1] - attention_mask.shape[1])
    length = int(cache.get_seq_length())
    cache.safevlm_prompt = CachedPrompt(
        sequences[:, :length].clone(),
        torch.cat([attention_mask, answer + 1], dim=1)[:, :length],
        torch.cat([pictures, answer.to(pictures)], dim=1)[:, :length],
        verdicts,
        _seal(cache),
    )


def reuse_cache(
    cache,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    pictures: torch.Tensor,
    verdicts: list[tuple[int, int]],
    token_id: int | None,
) -> int:
    """
    Cuts `cache` down to what it has in common with a prompt.

    Args:
        pictures (`torch.LongTensor` of shape `(batch_size, sequence_length)`): See [`picture_digests`].
        token_id (`int`, *optional*): The safety placeholder's.

    Returns:
        `int`: How many of the prompt's tokens the cache holds.

    Raises:
        `ValueError`: The prompt is shorter than a cache that something else than `generate` made.
    """
    if cache is None:
        return 0
    if not isinstance(cache, Cache):
        raise ValueError(f"`past_key_values` must be a `Cache` such as `DynamicCache()`, got {type(cache).__name__}.")
    length = int(cache.get_seq_length())
    ours = "safevlm_prompt" in vars(cache)
    known, cache.safevlm_prompt = vars(cache).get("safevlm_prompt"), None  # unknown until the call ends well
    if length == 0:
        return 0
    if not ours and length >= input_ids.shape[1]:
        raise ValueError(
            f"`past_key_values` holds {length} tokens and `input_ids` only {input_ids.shape[1]}: pass the whole "
            f"conversation's `input_ids` and images, as the safety head reads all of it."
        )
    keep = 0
    if known is not None and len(known.input_ids) == len(input_ids) and _is_sealed(cache, known):
        end = min(length, known.input_ids.shape[1], input_ids.shape[1] - 1)  # something must be left to process
        same = (known.input_ids[:, :end] == input_ids[:, :end]) & (pictures[:, :end] != UNKNOWN)
        same &= known.attention_mask[:, :end] == attention_mask[:, :end]
        same &= known.pictures[:, :end] == pictures[:, :end]
        for row, verdict in enumerate(verdicts):
            if verdict != known.verdicts[row] and token_id is not None:
                same[row] &= input_ids[row, :end] != token_id
        keep = int(same.all(dim=0).int().cumprod(dim=0).sum())
    surplus = length - keep
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
