"""The demo's base: a tiny LLaVA, trained on the spot."""
