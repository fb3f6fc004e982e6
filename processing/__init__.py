"""The processor. `safevlm.SafeVlmProcessor` is its public name; pictures.py can be imported without transformers."""
