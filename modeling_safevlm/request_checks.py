"""What a call may not bring: prompts, images or settings that would reach the language model past the safety head."""

import torch


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
