"""The picture world: its scenes, pictures, questions and risk labels."""
