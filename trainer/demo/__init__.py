"""The demo: a picture world, a tiny base model, and the whole way from there to a saved SafeVLM."""
