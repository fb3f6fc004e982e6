"""Continuing a chat from a cache, as far as the cache holds this prompt with the same pictures and verdicts.

After `generate` a cache records what is in it. The next turn cuts it at the first token that differs: a hint that the
new prompt lacks, another picture, a safety embedding conditioned on another verdict. Everything after the cut is
processed again, so the answer is the same as without a cache. A cache with unknown contents (made or changed by other
code, or left behind by an error) is emptied.
"""

import hashlib
import secrets
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer

_HASH_KEY = secrets.token_bytes(16)  # nobody who lacks it can construct two pictures with the same digest


@dataclass
class CachedPrompt:
    """
    Args:
        keys (`torch.LongTensor` of shape `(batch_size, length, 5)`): What the cache holds, see [`token_keys`].
        seal (`tuple`): The state that the cache was left in, see [`_seal`].
    """

    keys: torch.Tensor
    seal: tuple


def picture_digests(input_ids: torch.Tensor, image_token_id: int, units: list[tuple] | None, tokens: list[int] | None):
    """
    A digest of the picture that each token stands for, of the shape of `input_ids`; 0 at all other tokens.

    Args:
        units (`list[tuple[torch.Tensor]]`, *optional*): The image tensors of each unit (see [`Backbone`]). Without
            them the digests are random, so that they equal no others.
        tokens (`list[int]`, *optional*): The number of image tokens of each unit.
    """
    is_image = input_ids == image_token_id
    digests = torch.where(is_image, -1 - secrets.randbits(62), 0)
    if units is not None and len(units) == len(tokens) and sum(tokens) == int(is_image.sum()):
        known = torch.tensor([_digest(unit) for unit in units], device=input_ids.device)
        digests[is_image] = known.repeat_interleave(torch.tensor(tokens, device=input_ids.device))
    return digests


def _digest(tensors: tuple) -> int:
    """A positive number from the tensors' bytes."""
    digest = hashlib.blake2b(digest_size=8, key=_HASH_KEY)
    for tensor in map(torch.as_tensor, tensors):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return (int.from_bytes(digest.digest(), "big") >> 1) + 1


def token_keys(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    pictures: torch.Tensor,
    verdicts: list[tuple[int, int]],
    safety_token_id: int | None,
) -> torch.Tensor:
    """
    Everything that a token's cache entry depends on besides the tokens before it: its id, mask and picture, and at
    placeholders the action and category that condition the safety embedding.

    Returns:
        `torch.LongTensor` of shape `(batch_size, sequence_length, 5)`
    """
    is_placeholder = input_ids == (-1 if safety_token_id is None else safety_token_id)
    conditions = torch.tensor(verdicts, device=input_ids.device).unsqueeze(1) * is_placeholder.unsqueeze(2)
    tokens = torch.stack([input_ids.long(), attention_mask.long(), pictures.to(input_ids.device)], dim=2)
    return torch.cat([tokens, conditions], dim=2)


def _seal(cache) -> tuple[torch.Tensor, int] | None:
    """
    The keys of the cache's first attention layer and how often they were written to; `None` if unknown. A layer gets
    new keys with each token, or writes to those it has, so any change breaks the seal. A copy of the cache keeps it.
    """
    for layer in cache.layers:
        if isinstance(keys := getattr(layer, "keys", None), torch.Tensor):
            if isinstance(layer, DynamicLayer):
                return keys, 0
            return None if keys.is_inference() else (keys, keys._version)
    return None


def remember_prompt(cache, sequences: torch.Tensor, keys: torch.Tensor, knowable: bool):
    """
    Records in `cache` what it holds.

    Args:
        sequences (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Prompt and answer.
        keys (`torch.LongTensor` of shape `(batch_size, prompt_length, 5)`): From [`token_keys`].
        knowable (`bool`): `False` after beam search (the cache holds the last active beams, which need not be the
            returned ones) and for bases that read a prompt in both directions (a longer prompt changes every entry).
    """
    cache.safevlm_prompt, seal = None, _seal(cache)
    if seal is None or not knowable or len(sequences) != len(keys):
        return
    answer = sequences[:, keys.shape[1] :]
    answer_keys = F.pad(torch.stack([answer, torch.ones_like(answer)], dim=2), (0, 3))  # neither pictures nor verdicts
    held = torch.cat([keys, answer_keys.to(keys)], dim=1)[:, : int(cache.get_seq_length())]
    cache.safevlm_prompt = CachedPrompt(held, seal)


def reuse_cache(cache, keys: torch.Tensor) -> int:
    """
    Cuts `cache` down to what it has in common with a prompt.

    Args:
        keys (`torch.LongTensor` of shape `(batch_size, sequence_length, 5)`): From [`token_keys`].

    Returns:
        `int`: How many of the prompt's tokens the cache holds.

    Raises:
        `ValueError`: The cache was not made by `generate`, and the prompt is no longer than it.
    """
    if cache is None:
        return 0
    if not isinstance(cache, Cache):
        raise ValueError(f"`past_key_values` must be a `Cache` such as `DynamicCache()`, got {type(cache).__name__}.")
    length = int(cache.get_seq_length())
    ours = hasattr(cache, "safevlm_prompt")
    known, cache.safevlm_prompt = getattr(cache, "safevlm_prompt", None), None  # unknown until the call succeeds
    if length == 0:
        return 0
    if not ours and length >= keys.shape[1]:
        raise ValueError(
            f"`past_key_values` holds {length} tokens and `input_ids` only {keys.shape[1]}: pass the whole "
            f"conversation's `input_ids` and images, since the safety head reads all of it."
        )
    num_kept, seal = 0, _seal(cache)
    is_sealed = known is not None and seal is not None and seal[0] is known.seal[0] and seal[1] == known.seal[1]
    if is_sealed and len(known.keys) == len(keys):
        end = min(length, known.keys.shape[1], keys.shape[1] - 1)  # at least one token must be left to process
        same = (known.keys[:, :end] == keys[:, :end]).all(dim=2).all(dim=0)  # (end,)
        num_kept = int(same.int().cumprod(dim=0).sum())
    if num_kept == length:
        return num_kept
    if num_kept and all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.crop(num_kept - length)
        return num_kept
    cache.reset()  # sliding windows, static and quantised caches cannot be cut
    return 0


def uncached_features(mm_encoder_outputs: dict, config, input_ids: torch.Tensor, num_cached: int) -> dict:
    """
    The part of pre-encoded images that the tokens after the first `num_cached` need; empty if they need none.

    Args:
        mm_encoder_outputs (`dict`): The output `"image"`, whose `pooler_output` (and `deepstack_features`) hold one
            vector per image token of `input_ids`, in order.
        config: The base model's, for the id of image tokens.
    """
    if not num_cached:
        return mm_encoder_outputs
    is_image = input_ids == config.image_token_id
    counts = [count for count in is_image[:, num_cached:].sum(dim=1).tolist() if count]
    if not counts:
        return {}
    is_uncached = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids) >= num_cached
    needed = is_uncached[is_image].nonzero().squeeze(1)  # positions among all image tokens

    def select(features):
        vectors = torch.cat([feature.reshape(-1, feature.shape[-1]) for feature in features])
        rows = vectors[needed.to(vectors.device)].split(counts)
        return torch.stack(rows) if isinstance(features, torch.Tensor) else list(rows)

    output = mm_encoder_outputs["image"]
    fields = {"pooler_output": select(output["pooler_output"])}
    if output.get("deepstack_features") is not None:
        fields["deepstack_features"] = [select(layer) for layer in output["deepstack_features"]]
    return {"image": type(output)(**fields)}
