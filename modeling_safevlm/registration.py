"""Registers the package's classes with the Auto classes of transformers. Importing this file takes seconds.

`safevlm/__init__.py` takes its public names from here: at once, or, in the `safevlm` command, when one is first used.
"""

from .configuration_safevlm import SafeVlmConfig  # isort: split

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .from_base import from_base
from .modeling_safevlm import SafeVlmForConditionalGeneration, SafeVlmOutput  # noqa: F401
from .pipeline_safevlm import SafeVlmPipeline  # noqa: F401
from .policy_file import write_policy
from .processing.from_base import from_base as processor_from_base
from .processing.processing_safevlm import SafeVlmProcessor
from .safety_adapter import save_safety_adapter
from .safety_policy import ACTIONS, POLICY_PRESETS, SafetyPolicy  # noqa: F401
from .safety_verdict import SafetyVerdict  # noqa: F401

# Only the package makes models and writes adapters and policies, so a saved model does not carry the code for it.
SafeVlmForConditionalGeneration.from_base = classmethod(from_base)
SafeVlmForConditionalGeneration.save_safety_adapter = save_safety_adapter
SafeVlmProcessor.from_base = classmethod(processor_from_base)
SafetyPolicy.to_file = write_policy

AutoConfig.register(SafeVlmConfig.model_type, SafeVlmConfig)
AutoProcessor.register(SafeVlmConfig, SafeVlmProcessor)
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(SafeVlmConfig, SafeVlmForConditionalGeneration)

# A model is saved with its code, so that `from_pretrained(..., trust_remote_code=True)` does not need safevlm.
SafeVlmConfig.register_for_auto_class()
SafeVlmForConditionalGeneration.register_for_auto_class("AutoModel")
SafeVlmForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
SafeVlmProcessor.register_for_auto_class()
