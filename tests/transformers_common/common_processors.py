"""transformers' `ProcessorTesterMixin` on `SafeVlmProcessor`, with the native families' processors as control.

Qwen2.5-VL's native processor needs torchvision for its video processor; without it, the control is the native class
with `video_processor=None` (safevlm's `base_processor_class`).
"""

import unittest
from unittest.mock import patch

from families import FAMILIES, build
from tests.test_processing_common import ProcessorTesterMixin
from tiny import tiny_processor
from transformers import LlavaProcessor

from safevlm import SafeVlmProcessor
from safevlm.processing.processing_safevlm import base_processor_class


class _ProcessorTest(ProcessorTesterMixin):
    @classmethod
    def _setup_tokenizer(cls):
        return cls.native().tokenizer

    @classmethod
    def _setup_image_processor(cls):
        return cls.native().image_processor

    @classmethod
    def _setup_test_attributes(cls, processor):
        cls.image_token = processor.image_token  # and no video token: no processor here takes videos

    @classmethod
    def native(cls):
        return build(cls.family)[1]

    @classmethod
    def prepare_processor_dict(cls):
        spec = FAMILIES[cls.family]
        return {**spec.settings, "chat_template": spec.chat_template}


class _SafeProcessorTest(_ProcessorTest):
    processor_class = SafeVlmProcessor

    @classmethod
    def setUpClass(cls):
        # Custom code notes itself in what is saved, which the tests compare with what was loaded.
        custom_code = patch.object(SafeVlmProcessor, "_auto_class", None)
        custom_code.start()
        cls.addClassCleanup(custom_code.stop)
        super().setUpClass()

    def does_processor_return_mm_offsets(self, processor_class, method_name):
        return method_name == "replace_image_token"  # the base's processor, which does the work, has it

    @classmethod
    def _setup_tokenizer(cls):
        return SafeVlmProcessor.from_base(cls.native()).tokenizer

    @classmethod
    def prepare_processor_dict(cls):
        spec = FAMILIES[cls.family]
        settings = {"base_processor_kwargs": spec.settings} if spec.settings else {}  # the tests cannot read {}
        return {
            "tokens_per_image": 8,
            "base_processor_class": spec.processor_class,
            "chat_template": spec.chat_template,
            **settings,
        }


class LlavaProcessorTest(_ProcessorTest, unittest.TestCase):
    family = "llava"
    processor_class = LlavaProcessor

    @classmethod
    def native(cls):
        return tiny_processor()


class SafeLlavaProcessorTest(_SafeProcessorTest, unittest.TestCase):
    family = "llava"


class Qwen2_5_VLProcessorTest(_ProcessorTest, unittest.TestCase):
    family = "qwen2_5_vl"
    processor_class = base_processor_class("Qwen2_5_VLProcessor")


class SafeQwen2_5_VLProcessorTest(_SafeProcessorTest, unittest.TestCase):
    family = "qwen2_5_vl"
