"""The files of a safety adapter (see safety_adapter.py), for code that inspects a folder without loading it."""

ADAPTER_WEIGHTS = "safety_adapter.safetensors"
LORA_WEIGHTS, LORA_CONFIG = "lora/adapter_model.safetensors", "lora/adapter_config.json"
