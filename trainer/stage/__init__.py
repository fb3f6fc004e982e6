"""One training stage: its arguments, its trainer, and what it does to the model before and after."""
