"""Tiny models and inputs as transformers' common tests expect them: for a native family, and for SafeVLM over it.

Sizes are those of transformers' own tests. Both kinds of model get similar inputs: a picture per row with text around
it (the attention tests mask the first or the last two tokens of a row). For SafeVLM, `<safety>` placeholders replace
the text after the picture.
"""

import torch
from tests.test_modeling_common import floats_tensor, ids_tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from safevlm import SafeVlmConfig, SafeVlmForConditionalGeneration

SIZES = dict(safety_hidden_size=32, num_safety_features=4, num_attention_heads=4, num_head_tokens=2)


class NativeTester:
    """The attributes of a model tester that the mixins read, as far as the families share them."""

    is_training = True
    batch_size = 7  # as in the attention tests, which fill smaller batches up with rows of random ids
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_image_tokens = 16
    seq_length = num_image_tokens + 18
    first_image_token = 4
    # Special tokens come first: a test clamps ids to a smaller vocabulary.
    pad_token_id = 0
    image_token_id = 3
    safety_token_id = 7
    num_special_tokens = 8
    image_positions = slice(first_image_token, first_image_token + num_image_tokens)

    def __init__(self, parent):
        self.parent = parent

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        text_tokens = self.vocab_size - self.num_special_tokens
        input_ids = ids_tensor([self.batch_size, self.seq_length], text_tokens) + self.num_special_tokens
        input_ids[:, self.image_positions] = self.image_token_id
        return config, {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            **self.image_inputs(config),
        }


class LlavaTester(NativeTester):
    model_class = LlavaForConditionalGeneration
    config_class = LlavaConfig

    def get_config(self):
        return LlavaConfig(
            text_config=LlamaConfig(
                vocab_size=self.vocab_size,
                hidden_size=self.hidden_size,
                num_hidden_layers=self.num_hidden_layers,
                num_attention_heads=self.num_attention_heads,
                intermediate_size=37,
                max_position_embeddings=512,
                pad_token_id=self.pad_token_id,
            ),
            vision_config=CLIPVisionConfig(
                image_size=8,
                patch_size=2,
                hidden_size=32,
                projection_dim=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=37,
            ),
            image_token_index=self.image_token_id,
            image_seq_length=self.num_image_tokens,
            vision_feature_layer=-1,
        )

    def image_inputs(self, config):
        vision = config.vision_config  # one picture per row
        shape = [self.batch_size, vision.num_channels, vision.image_size, vision.image_size]
        return {"pixel_values": floats_tensor(shape)}


class Qwen2_5_VLTester(NativeTester):
    model_class = Qwen2_5_VLForConditionalGeneration
    config_class = Qwen2_5_VLConfig

    def get_config(self):
        return Qwen2_5_VLConfig(
            text_config=dict(
                vocab_size=self.vocab_size,
                hidden_size=self.hidden_size,
                num_hidden_layers=self.num_hidden_layers,
                num_attention_heads=self.num_attention_heads,
                num_key_value_heads=2,
                intermediate_size=37,
                hidden_act="silu",
                max_position_embeddings=512,
                rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
                pad_token_id=self.pad_token_id,
            ),
            vision_config=dict(
                depth=2,
                hidden_size=32,
                intermediate_size=32,
                out_hidden_size=self.hidden_size,
                num_heads=4,
                patch_size=14,
                spatial_merge_size=1,
                temporal_patch_size=2,
                window_size=28,
                fullatt_block_indexes=[1],
            ),
            image_token_id=self.image_token_id,
            vision_start_token_id=4,
            vision_end_token_id=5,
            video_token_id=6,
        )

    def image_inputs(self, config):
        vision = config.vision_config
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        side = round(self.num_image_tokens**0.5)
        token_types = torch.zeros(self.batch_size, self.seq_length, dtype=torch.int)
        token_types[:, self.image_positions] = 1
        return {
            "pixel_values": floats_tensor([self.batch_size * self.num_image_tokens, patch]),
            "image_grid_thw": torch.tensor([[1, side, side]] * self.batch_size),
            "mm_token_type_ids": token_types,
        }


class SafeTester:
    """SafeVLM over the family of a native tester."""

    model_class = SafeVlmForConditionalGeneration
    config_class = SafeVlmConfig

    def __init__(self, native: NativeTester):
        self.native = native

    def __getattr__(self, name):
        return getattr(self.native, name)

    def get_config(self):
        return SafeVlmConfig(
            base_config=self.native.get_config(), safety_token_id=self.native.safety_token_id, **SIZES
        )

    def prepare_config_and_inputs_for_common(self):
        _, inputs = self.native.prepare_config_and_inputs_for_common()
        config = self.get_config()
        start = self.native.image_positions.stop
        inputs["input_ids"][:, start : start + config.tokens_per_image] = config.safety_token_id
        return config, inputs
