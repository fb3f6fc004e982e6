"""The package's classes, registered with the Auto classes of transformers. Importing this file takes seconds.

`safevlm/__init__.py` imports it at once, or, as the `safevlm` command, when a command first asks for a class.
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
from .modeling_safevlm import SafeVlmForConditionalGeneration, SafeVlmOutput
from .pipeline_safevlm import SafeVlmPipeline
from .policy_file import write_policy
from .processing.from_base import from_base as processor_from_base
from .processing.processing_safevlm import SafeVlmProcessor
from .safety_adapter import save_safety_adapter
from .safety_policy import ACTIONS, POLICY_PRESETS, SafetyPolicy
from .safety_verdict import SafetyVerdict

__all__ = [
    "ACTIONS",
    "POLICY_PRESETS",
    "SafeVlmConfig",
    "SafeVlmForConditionalGeneration",
    "SafeVlmOutput",
    "SafeVlmPipeline",
    "SafeVlmProcessor",
    "SafetyPolicy",
    "SafetyVerdict",
]

# What a saved model does not need, and so does not carry: making a model, and writing an adapter or a policy.
SafeVlmForConditionalGeneration.from_base = classmethod(from_base)
SafeVlmProcessor.from_base = classmethod(processor_from_base)
SafeVlmForConditionalGeneration.save_safety_adapter = save_safety_adapter
SafetyPolicy.to_file = write_policy

AutoConfig.register(SafeVlmConfig.model_type, SafeVlmConfig)
AutoModel.register(SafeVlmConfig, SafeVlmForConditionalGeneration)
AutoModelForImageTextToText.register(SafeVlmConfig, SafeVlmForConditionalGeneration)
AutoModelForMultimodalLM.register(SafeVlmConfig, SafeVlmForConditionalGeneration)
AutoProcessor.register(SafeVlmConfig, SafeVlmProcessor)

# What is saved carries its code: `from_pretrained(..., trust_remote_code=True)` needs no safevlm.
SafeVlmConfig.register_for_auto_class()
SafeVlmForConditionalGeneration.register_for_auto_class("AutoModel")
SafeVlmForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
SafeVlmProcessor.register_for_auto_class()
