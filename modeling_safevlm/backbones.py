"""Where each family of vision-language models keeps what SafeVLM needs: one explicit adapter per family.

An adapter runs the base's vision tower once and returns its output in the two forms needed: as the base model's
`forward` takes it (`mm_encoder_outputs`), and as patch features for the safety projector. How to add a family is told
in the README beside this file.
"""

from dataclasses import dataclass

import torch

from .safety_modules import IGNORE_INDEX


@dataclass
class VisionFeatures:
    """
    The vision tower's output in *units*: whole images, or the tiles that a family cuts images into.

    Args:
        mm_encoder_outputs (`dict`): For the base model's `forward` or `generate`. Beam search changes it: use it once.
        patches (sequence of `torch.FloatTensor` of shape `(num_patches, vision_hidden_size)`): One per unit.
        tokens (`list[int]`): How many image tokens each unit takes in the prompt.
    """

    mm_encoder_outputs: dict
    patches: list[torch.Tensor]
    tokens: list[int]


@dataclass
class ImageFeatures:
    """
    Args:
        vision (`VisionFeatures`): The base's own features.
        safety (`torch.FloatTensor` of shape `(num_images, num_safety_features, safety_hidden_size)`)
        rows (`torch.LongTensor` of shape `(num_images,)`): The row of the batch each image belongs to.
    """

    vision: VisionFeatures
    safety: torch.Tensor
    rows: torch.Tensor


class Backbone:
    """
    Adapter of one family. Stateless: works on the base's config and on the base model it is handed.

    A subclass says in `patches` and `tokens` what the output of `base.get_image_features` holds.
    """

    # The arguments of `forward` that describe images; `pixel_values` first.
    image_inputs: tuple[str, ...] = ("pixel_values",)
    # How many dimensions `pixel_values` may have.
    pixel_ndims: tuple[int, ...] = (4,)
    # Where the language model's parameters are within the base: what stage 2 trains, LoRA goes into the first.
    language_model_parts: tuple[str, ...] = ("model.language_model", "lm_head")
    # The safety projector that fits: "c_abstractor" where an image is always one square grid of patches.
    projector_type: str = "resampler"
    # Whether a prompt's tokens are read without what follows them, so that a longer prompt leaves them as they were.
    reads_forwards: bool = True

    def __init__(self, config):
        self.config = config

    @property
    def image_token_id(self) -> int:
        return self.config.image_token_id

    @property
    def vision_hidden_size(self) -> int:
        """Width of [`VisionFeatures.patches`]."""
        return self.config.vision_config.hidden_size

    def encode(self, base, **image_inputs) -> VisionFeatures:
        """Runs the vision tower of `base` on `image_inputs`, once."""
        output = base.get_image_features(**image_inputs, return_dict=True)
        return VisionFeatures({"image": output}, self.patches(output, **image_inputs), self.tokens(output))

    def forget(self, base):
        """Makes `base` forget what it noted of its last prompt: a cache may be another's."""

    def training_inputs(self, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the base's `forward` needs beside the processor's tensors when there are `labels`."""
        return {}

    def patches(self, output, **image_inputs) -> list[torch.Tensor]:
        """One tensor of shape `(num_patches, vision_hidden_size)` per unit. By default the tower's last states."""
        return list(output.last_hidden_state)

    def tokens(self, output) -> list[int]:
        """Image tokens per unit. By default `pooler_output` has one entry per unit."""
        return [len(unit) for unit in output.pooler_output]

    def units(self, **image_inputs) -> list[tuple[torch.Tensor, ...]]:
        """What describes each unit, to tell it from others. By default each input has one entry per unit."""
        return list(zip(*image_inputs.values(), strict=True))


class LlavaBackbone(Backbone):
    """LLaVA-1.5, ViP-LLaVA: a fixed square grid of patches per image, features taken from `vision_feature_layer`."""

    projector_type = "c_abstractor"

    @property
    def _layers(self) -> list[int]:
        layers = self.config.vision_feature_layer
        return [layers] if isinstance(layers, int) else list(layers)

    @property
    def vision_hidden_size(self) -> int:
        return self.config.vision_config.hidden_size * len(self._layers)

    def patches(self, output, **image_inputs):
        patches = torch.cat([output.hidden_states[layer] for layer in self._layers], dim=-1)
        # CLIP's class token is no patch, whichever strategy the base's own projector follows.
        num_patches = (self.config.vision_config.image_size // self.config.vision_config.patch_size) ** 2
        return list(patches[:, patches.shape[1] - num_patches :])


class LlavaNextBackbone(LlavaBackbone):
    """LLaVA-NeXT: an image is a base view and as many tiles as its size asks for."""

    image_inputs = ("pixel_values", "image_sizes")
    pixel_ndims = (4, 5)
    projector_type = "resampler"

    def patches(self, output, image_sizes=None, **image_inputs):
        tiles = super().patches(output)
        images = []
        for num_tiles in self._tiles_per_image(image_sizes, **image_inputs):
            images.append(torch.cat(tiles[:num_tiles]))
            tiles = tiles[num_tiles:]
        return images

    def _tiles_per_image(self, image_sizes, **image_inputs) -> list[int]:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        view = self.config.vision_config.image_size
        return [image_size_to_num_patches(size, self.config.image_grid_pinpoints, view) for size in image_sizes]


class LlavaOnevisionBackbone(LlavaNextBackbone):
    """LLaVA-OneVision: as LLaVA-NeXT, but images are not cut into tiles where a prompt has several."""

    image_inputs = ("pixel_values", "image_sizes", "batch_num_images")

    def _tiles_per_image(self, image_sizes, batch_num_images=None, **image_inputs):
        tiles = super()._tiles_per_image(image_sizes)
        if batch_num_images is None:
            return tiles
        alone = [n == 1 for n in self._images_beside(batch_num_images)]
        return [n if is_alone else 1 for n, is_alone in zip(tiles, alone, strict=True)]

    def units(self, batch_num_images=None, **image_inputs):
        if batch_num_images is not None:
            image_inputs["images_beside"] = self._images_beside(batch_num_images)
        return super().units(**image_inputs)

    def _images_beside(self, batch_num_images) -> list[int]:
        """For each image, how many its prompt has."""
        return [int(n) for n in batch_num_images for _ in range(int(n))]


class QwenVLBackbone(Backbone):
    """Qwen2-VL to Qwen3.5: native resolution, the patches of all images packed behind one another."""

    image_inputs = ("pixel_values", "image_grid_thw")
    pixel_ndims = (2,)

    @property
    def vision_hidden_size(self) -> int:
        vision = self.config.vision_config
        # Qwen2-VL calls the tower's width `embed_dim`; its `hidden_size` is the language model's.
        return getattr(vision, "embed_dim", None) or vision.hidden_size

    def patches(self, output, image_grid_thw=None, **image_inputs):
        return list(output.last_hidden_state.split(image_grid_thw.prod(-1).tolist()))

    def forget(self, base):
        base.model.rope_deltas = None  # how far pictures move the positions behind them

    def units(self, pixel_values, image_grid_thw):
        return list(zip(pixel_values.split(image_grid_thw.prod(-1).tolist()), image_grid_thw, strict=True))


class Gemma3Backbone(Backbone):
    """Gemma 3: SigLIP's square grid; pan-and-scan adds crops as further units of an image."""


class PaliGemmaBackbone(Backbone):
    """PaliGemma: SigLIP's square grid; the prompt is read in both directions, the answer forwards."""

    projector_type = "c_abstractor"
    reads_forwards = False

    def training_inputs(self, labels):
        return {"token_type_ids": (labels != IGNORE_INDEX).long()}


class Idefics3Backbone(Backbone):
    """Idefics3, SmolVLM: tiles of one size; `pooler_output` has one entry per row of the batch."""

    image_inputs = ("pixel_values", "pixel_attention_mask")
    pixel_ndims = (5,)
    language_model_parts = ("model.text_model", "lm_head")

    def tokens(self, output):
        num_tiles = len(output.last_hidden_state)
        return [sum(len(row) for row in output.pooler_output) // num_tiles] * num_tiles

    def units(self, **image_inputs):
        tiles = super().units(**{name: value.flatten(0, 1) for name, value in image_inputs.items()})
        return [tile for tile in tiles if tile[0].any()]  # the others pad rows that have fewer


class InternVLBackbone(Backbone):
    """InternVL: tiles of one size, with a class token each; features taken from `vision_feature_layer`."""

    def patches(self, output, **image_inputs):
        layer = self.config.vision_feature_layer
        states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        return list(states[:, 1:] if self.config.vision_feature_select_strategy == "default" else states)


BACKBONES: dict[str, type[Backbone]] = {
    "gemma3": Gemma3Backbone,
    "idefics3": Idefics3Backbone,
    "internvl": InternVLBackbone,
    "llava": LlavaBackbone,
    "llava_next": LlavaNextBackbone,
    "llava_onevision": LlavaOnevisionBackbone,
    "paligemma": PaliGemmaBackbone,
    "qwen2_5_vl": QwenVLBackbone,
    "qwen2_vl": QwenVLBackbone,
    "qwen3_5": QwenVLBackbone,
    "qwen3_vl": QwenVLBackbone,
    "qwen3_vl_moe": QwenVLBackbone,
    "smolvlm": Idefics3Backbone,
    "vipllava": LlavaBackbone,
}


def get_backbone(base_config) -> Backbone:
    """The adapter for a base model's configuration."""
    model_type = getattr(base_config, "model_type", None)
    if model_type not in BACKBONES:
        raise ValueError(
            f"The base model is of type {model_type!r}; SafeVLM supports {', '.join(sorted(BACKBONES))}. A new family "
            f"of vision-language models needs a `Backbone` adapter of some ten lines: modeling_safevlm/README.md, "
            f'"Adding a family", shows how. A model without vision cannot be a base.'
        )
    return BACKBONES[model_type](base_config)


def rows_of_units(image_tokens_per_row: list[int], tokens: list[int]) -> list[int]:
    """
    Which row of the batch each unit belongs to, from how many image tokens each row has and each unit takes.

    Units come in the order of the rows. Raises `ValueError` if tokens and units do not add up row by row.
    """
    rows, unit = [], 0
    for row, expected in enumerate(image_tokens_per_row):
        found = 0
        while found < expected and unit < len(tokens):
            found += tokens[unit]
            rows.append(row)
            unit += 1
        if found != expected:
            raise ValueError(
                f"Row {row} of `input_ids` has {expected} image tokens, but its images take {found}: "
                f"use the processor that was saved with this model, and pass the images in the order of the prompts."
            )
    if unit < len(tokens):
        raise ValueError(
            f"{len(tokens)} images were passed, but `input_ids` has image tokens for {unit} of them only."
        )
    return rows


def units_of_images(
    input_ids: torch.Tensor, image_token_id: int, safety_token_id: int | None, tokens_per_image: int, tokens: list[int]
) -> tuple[list[int], list[list[int]]]:
    """
    Which row each image belongs to, and which units it consists of: the processor ends each image's tokens with
    `tokens_per_image` placeholders. Without placeholders every unit counts as an image of its own.

    Raises:
        `ValueError`: The prompt's image tokens or placeholders do not fit the units.
    """
    is_image = input_ids == image_token_id
    rows = rows_of_units(is_image.sum(dim=1).tolist(), tokens)
    seen = is_image.cumsum(dim=1)
    placeholders = [row[at] for row, at in zip(seen, input_ids == safety_token_id, strict=True)]
    if not tokens_per_image and not any(len(row) for row in placeholders):
        return rows, [[unit] for unit in range(len(tokens))]

    image_rows, image_units, unit = [], [], 0
    for row, ends in enumerate(placeholders):
        num_units, found = rows.count(row), 0
        # `ends`: after how many of the row's image tokens each placeholder comes.
        ends, counts = (values.tolist() for values in ends.unique_consecutive(return_counts=True))
        for end in ends:
            image_rows.append(row)
            image_units.append([])
            while found < end:
                image_units[-1].append(unit)
                found += tokens[unit]
                unit += 1
        fits = set(counts) <= {tokens_per_image} and all(image_units) and unit == sum(r <= row for r in rows)
        if not fits or (ends and found != ends[-1]):
            raise ValueError(
                f"`input_ids` has {[len(row) for row in placeholders]} `<safety>` placeholders per row, which do not "
                f"fit its images: the model expects {tokens_per_image} after the tokens of each image (row {row} has "
                f"{num_units} image or tile features). The processor does not match the model: use the "
                f"SafeVlmProcessor saved with it, or `SafeVlmProcessor.from_base(..., config=model.config)`."
            )
    return image_rows, image_units


def patches_of_images(patches: list[torch.Tensor], units: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The patches of each image's units behind one another, padded to the image with the most.

    Returns:
        `torch.FloatTensor` of shape `(num_images, max_patches, vision_hidden_size)`, and a mask of its first two
        dimensions that is `False` at padding, or `None` if there is none.
    """
    images = [torch.cat([patches[unit] for unit in mine]) for mine in units]
    lengths = [len(image) for image in images]
    if len(set(lengths)) == 1:
        return torch.stack(images), None
    padded = torch.nn.utils.rnn.pad_sequence(images, batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    return padded, mask.to(padded.device)
