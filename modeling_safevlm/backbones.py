"""Where each family of vision-language models keeps what SafeVLM needs: one explicit adapter per family.

An adapter runs the base's vision tower once and returns its output in two forms: as the base model's `forward` takes
it (`mm_encoder_outputs`), and as patch features for the safety projector. The README beside this file shows how to add
a family.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch

from .safety_labels import IGNORE_INDEX


@dataclass
class VisionFeatures:
    """
    The vision tower's output in *units*: whole images, or the tiles that a family cuts images into.

    Args:
        mm_encoder_outputs (`dict`): For the base model's `forward` or `generate`. Beam search changes it: use it once.
        patches (`list[torch.FloatTensor]`, each of shape `(num_patches, vision_hidden_size)`): One per unit.
        tokens (`list[int]`): Number of image tokens of each unit in the prompt.
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
    Adapter of one family. It has no state beside the base's configuration.

    A subclass says in `patches` and `tokens` what the output of `base.get_image_features` holds.
    """

    # The arguments of `forward` that describe images; `pixel_values` first.
    image_inputs: tuple[str, ...] = ("pixel_values",)
    # Numbers of dimensions that `pixel_values` may have.
    pixel_ndims: tuple[int, ...] = (4,)
    # The safety projector that fits: "c_abstractor" if every image is one square grid of patches.
    projector_type: str = "resampler"
    # Whether attention is causal in the prompt: then a longer prompt leaves the states of its beginning unchanged.
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
        """Clears what `base` remembers of its last prompt: the cache of the next call may be of another prompt."""

    def training_inputs(self, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the base's `forward` needs, beside the processor's tensors, if it gets `labels`."""
        return {}

    def patches(self, output, **image_inputs) -> list[torch.Tensor]:
        """One tensor of shape `(num_patches, vision_hidden_size)` per unit. By default the tower's last states."""
        return list(output.last_hidden_state)

    def tokens(self, output) -> list[int]:
        """Image tokens per unit. By default `pooler_output` has one entry per unit."""
        return [len(unit) for unit in output.pooler_output]

    def units(self, **image_inputs) -> list[tuple[torch.Tensor, ...]]:
        """The tensors that tell each unit from others. By default each input has one entry per unit."""
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
        # CLIP's class token is not a patch, whatever the base's own projector does with it.
        num_patches = (self.config.vision_config.image_size // self.config.vision_config.patch_size) ** 2
        return list(patches[:, patches.shape[1] - num_patches :])


class LlavaNextBackbone(LlavaBackbone):
    """LLaVA-NeXT: an image is a base view and, depending on its size, a number of tiles."""

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
    """LLaVA-OneVision: as LLaVA-NeXT, but images are not cut into tiles if the prompt has several."""

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
        """For each image, the number of images in its prompt."""
        return [int(n) for n in batch_num_images for _ in range(int(n))]


class QwenVLBackbone(Backbone):
    """Qwen2-VL to Qwen3.5: native resolution, the patches of all images packed into one tensor."""

    image_inputs = ("pixel_values", "image_grid_thw")
    pixel_ndims = (2,)

    @property
    def vision_hidden_size(self) -> int:
        vision = self.config.vision_config
        # Qwen2-VL calls the tower's width `embed_dim`; its `hidden_size` is the language model's width.
        return getattr(vision, "embed_dim", None) or vision.hidden_size

    def patches(self, output, image_grid_thw=None, **image_inputs):
        return list(output.last_hidden_state.split(image_grid_thw.prod(-1).tolist()))

    def forget(self, base):
        base.model.rope_deltas = None  # by how much images shift the positions after them

    def units(self, pixel_values, image_grid_thw):
        return list(zip(pixel_values.split(image_grid_thw.prod(-1).tolist()), image_grid_thw, strict=True))


class Gemma3Backbone(Backbone):
    """Gemma 3: SigLIP's square grid; pan-and-scan adds crops as further units of an image."""


class PaliGemmaBackbone(Backbone):
    """PaliGemma: SigLIP's square grid; attention is bidirectional in the prompt and causal in the answer."""

    projector_type = "c_abstractor"
    reads_forwards = False

    def training_inputs(self, labels):
        return {"token_type_ids": (labels != IGNORE_INDEX).long()}


class Idefics3Backbone(Backbone):
    """Idefics3, SmolVLM: tiles of one size; `pooler_output` has one entry per row of the batch."""

    image_inputs = ("pixel_values", "pixel_attention_mask")
    pixel_ndims = (5,)

    def tokens(self, output):
        num_tiles = len(output.last_hidden_state)
        return [sum(len(row) for row in output.pooler_output) // num_tiles] * num_tiles

    def units(self, **image_inputs):
        tiles = super().units(**{name: value.flatten(0, 1) for name, value in image_inputs.items()})
        return [tile for tile in tiles if tile[0].any()]  # the others pad rows with fewer tiles


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
    The row of the batch that each unit belongs to, given each row's and each unit's number of image tokens. Units
    come in the order of the rows.

    Raises:
        `ValueError`: The numbers of image tokens do not add up row by row.
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
    input_ids: torch.Tensor, image_token_id: int, config, tokens: list[int]
) -> tuple[list[int], list[list[int]]]:
    """
    The row that each image belongs to, and the units it consists of: the processor ends each image's tokens with
    `config.tokens_per_image` placeholders. Without placeholders every unit counts as an image.

    Raises:
        `ValueError`: The prompt's image tokens or placeholders do not fit the units.
    """
    is_image, is_placeholder = input_ids == image_token_id, input_ids == config.safety_token_id
    rows = rows_of_units(is_image.sum(dim=1).tolist(), tokens)
    tokens_per_image = config.tokens_per_image
    if not tokens_per_image and not is_placeholder.any():
        return rows, [[unit] for unit in range(len(tokens))]

    # A place in the batch is told by the number of image tokens up to it, and by its row.
    image_tokens = is_image.flatten().cumsum(dim=0).view_as(input_ids)
    places = torch.stack([is_placeholder.nonzero()[:, 0], image_tokens[is_placeholder]], dim=1)
    places, num_placeholders = places.unique_consecutive(dim=0, return_counts=True)
    unit_ends = list(accumulate(tokens))
    image_rows, image_units, first = [], [], 0
    for (row, end), count in zip(places.tolist(), num_placeholders.tolist(), strict=True):
        units = [unit for unit in range(first, len(tokens)) if unit_ends[unit] <= end]
        if count != tokens_per_image or not units or rows[first] != row or unit_ends[units[-1]] != end:
            break
        image_rows.append(row)
        image_units.append(units)
        first += len(units)
    if first < len(tokens) or len(image_rows) < len(places):
        row = rows[first] if first < len(tokens) else int(places[len(image_rows), 0])
        raise ValueError(
            f"`input_ids` has {is_placeholder.sum(dim=1).tolist()} `<safety>` placeholders per row, which do not "
            f"fit its images: the model expects {tokens_per_image} after the tokens of each image (row {row} has "
            f"{rows.count(row)} image or tile features). The processor does not match the model: use the "
            f"SafeVlmProcessor saved with it, or `SafeVlmProcessor.from_base(..., config=model.config)`."
        )
    return image_rows, image_units


def patches_of_images(patches: list[torch.Tensor], units: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The patches of each image, those of its units concatenated, padded to the longest image.

    Returns:
        `torch.FloatTensor` of shape `(num_images, max_patches, vision_hidden_size)`, and a mask of its first two
        dimensions that is `False` at padding, or `None` if there is no padding.
    """
    images = [torch.cat([patches[unit] for unit in units_of_image]) for units_of_image in units]
    lengths = torch.tensor([len(image) for image in images])
    padded = torch.nn.utils.rnn.pad_sequence(images, batch_first=True)
    if (lengths == padded.shape[1]).all():
        return padded, None
    mask = torch.arange(padded.shape[1]) < lengths.unsqueeze(1)  # (num_images, max_patches)
    return padded, mask.to(padded.device)


def compute_device(module: torch.nn.Module) -> torch.device:
    """The device that `module` computes on; `weight.device` is "meta" while accelerate keeps a weight offloaded."""
    for child in module.modules():
        hook = getattr(child, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            if getattr(part, "execution_device", None) is not None:
                return torch.device(part.execution_device)
        for weight in child.parameters(recurse=False):
            if weight.device.type != "meta":
                return weight.device
    return torch.device("cpu")
