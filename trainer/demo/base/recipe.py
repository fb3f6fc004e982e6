"""How large the demo's base is trained: the numbers of pictures and steps, the rates and shares."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BaseRecipe:
    """
    Numbers of the training run. The defaults need about two minutes on two cores.

    Args:
        pictures (`int`): Drawn for training.
        tower_steps, tower_batch (`int`), tower_learning_rate (`float`): Of the vision tower's own training.
        steps, pictures_per_step (`int`): Of the language model's training.
        row_length (`int`): Tokens of the picture and the questions packed behind it, about five.
        learning_rate, muon_learning_rate (`float`): Of AdamW and Muon.
        instruction_share, risky_request_share (`float`): Of the questions, in [0, 1].
        dev_pictures (`int`): To evaluate on.
    """

    pictures: int = 16_000
    tower_steps: int = 300
    tower_batch: int = 128
    tower_learning_rate: float = 2e-3
    steps: int = 700
    pictures_per_step: int = 16
    row_length: int = 136
    learning_rate: float = 2e-3
    muon_learning_rate: float = 4e-3
    instruction_share: float = 0.12
    risky_request_share: float = 0.35
    dev_pictures: int = 600


FULL = BaseRecipe()
FAST = BaseRecipe(pictures=6_000, tower_steps=120, tower_batch=64, steps=220, dev_pictures=200)
