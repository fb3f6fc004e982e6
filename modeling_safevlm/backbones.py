"""Where each family of vision-language models keeps what SafeVLM needs: one explicit adapter per family.

An adapter runs the base's vision tower once and returns its output in the two forms needed: as the base model's
`forward` takes it (`mm_encoder_outputs`), and as patch features for the safety projector. To add a family, subclass
[`Backbone`] and put it into `BACKBONES` under the base config's `model_type`.
"""

from dataclasses import dataclass

import torch


@dataclass
class VisionFeatures:
    """
    Args:
        mm_encoder_outputs (`dict`): For the base model's `forward` or `generate`. Beam search changes it: use it once.
        patches (`torch.FloatTensor` of shape `(num_images, num_patches, vision_hidden_size)`)
        patch_mask (`torch.BoolTensor` of shape `(num_images, num_patches)`, *optional*): `False` marks padding.
        tokens_per_image (`list[int]`): How many image tokens each image takes in the prompt.
    """

    mm_encoder_outputs: dict
    patches: torch.Tensor
    patch_mask: torch.Tensor | None
    tokens_per_image: list[int]


class Backbone:
    """Adapter of one family. Stateless: works on the base's config and on the base model it is handed."""

    # The arguments of `forward` that carry images; `pixel_values` first.
    image_inputs: tuple[str, ...] = ("pixel_values",)
    # Where the language model's parameters are within the base: what stage 2 trains, LoRA goes into the first.
    language_model_parts: tuple[str, ...] = ("model.language_model", "lm_head")

    def __init__(self, config):
        self.config = config

    @property
    def image_token_id(self) -> int:
        return self.config.image_token_id

    @property
    def vision_hidden_size(self) -> int:
        """Width of [`VisionFeatures.patches`]."""
        raise NotImplementedError

    def encode(self, base, **image_inputs) -> VisionFeatures:
        """Runs the vision tower of `base` on `image_inputs`, once."""
        raise NotImplementedError


class LlavaBackbone(Backbone):
    """LLaVA-1.5: a fixed square grid of patches per image, features taken from `vision_feature_layer`."""

    @property
    def _layers(self) -> list[int]:
        layers = self.config.vision_feature_layer
        return [layers] if isinstance(layers, int) else list(layers)

    @property
    def vision_hidden_size(self) -> int:
        return self.config.vision_config.hidden_size * len(self._layers)

    def encode(self, base, pixel_values) -> VisionFeatures:
        output = base.get_image_features(pixel_values=pixel_values, return_dict=True)
        patches = torch.cat([output.hidden_states[layer] for layer in self._layers], dim=-1)
        # CLIP's class token is no patch, whichever strategy the base's own projector follows.
        num_patches = (self.config.vision_config.image_size // self.config.vision_config.patch_size) ** 2
        patches = patches[:, patches.shape[1] - num_patches :]
        return VisionFeatures(
            mm_encoder_outputs={"image": output},
            patches=patches,
            patch_mask=None,
            tokens_per_image=[len(image) for image in output.pooler_output],
        )


BACKBONES: dict[str, type[Backbone]] = {"llava": LlavaBackbone}


def get_backbone(base_config) -> Backbone:
    """The adapter for a base model's configuration."""
    model_type = getattr(base_config, "model_type", None)
    if model_type not in BACKBONES:
        raise ValueError(
            f"The base model is of type {model_type!r}; SafeVLM supports {', '.join(sorted(BACKBONES))}. A new family "
            f"of vision-language models needs a `Backbone` adapter in modeling_safevlm/backbones.py; a model without "
            f"vision cannot be a base."
        )
    return BACKBONES[model_type](base_config)


def rows_of_images(image_tokens_per_row: list[int], tokens_per_image: list[int]) -> list[int]:
    """
    Which row of the batch each image belongs to, from how many image tokens each row has and each image takes.

    Images come in the order of the rows. Raises `ValueError` if tokens and images do not add up row by row.
    """
    rows, image = [], 0
    for row, expected in enumerate(image_tokens_per_row):
        found = 0
        while found < expected and image < len(tokens_per_image):
            found += tokens_per_image[image]
            rows.append(row)
            image += 1
        if found != expected:
            raise ValueError(
                f"Row {row} of `input_ids` has {expected} image tokens, but its images take {found}: "
                f"use the processor that was saved with this model, and pass the images in the order of the prompts."
            )
    if image < len(tokens_per_image):
        raise ValueError(
            f"{len(tokens_per_image)} images were passed, but `input_ids` has image tokens for {image} of them only."
        )
    return rows
