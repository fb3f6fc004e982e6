"""One training stage: its arguments, its trainer, and what happens to the model before and after training."""
