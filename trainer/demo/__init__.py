"""The embedded default: a picture world, a tiny base VLM, the whole run."""
