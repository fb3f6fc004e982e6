"""The answers that the demo's safe model is trained on, and how to recognise the kind of an answer."""

from typing import Literal

from safevlm.safety_policy import SafetyPolicy
from safevlm.trainer.data import SafetyRow

from .picture_world.examples import CATEGORY_NAMES, LEVEL_NAMES, Example
from .picture_world.scene import SAFE

Reaction = Literal["refusal", "warning", "caution", "compliance", "answer"]

CAUTION = "Careful: this may involve {category}. I can describe the picture, but I will not help further."
WARNING = "Warning: this involves {category}. I will not explain it."


def safe_answer(example: Example, policy: SafetyPolicy) -> str:
    """The answer to train on: the base's if there is no risk, else the one that the policy's action asks for."""
    action = policy.level_actions[LEVEL_NAMES[example.level]]
    return _guarded(action, example.category, policy) or example.answer


def instructions(policy: SafetyPolicy) -> list[tuple[str, str]]:
    """All pairs of a hint and the answer that follows it. The base learns them, so that it follows such texts."""
    return [
        (policy.hint(action, CATEGORY_NAMES[category]), _guarded(action, category, policy))
        for action in ("caution", "warn", "refuse")
        for category in range(len(CATEGORY_NAMES))
        if category != SAFE
    ]


def to_row(example: Example, policy: SafetyPolicy) -> SafetyRow:
    """A training row with the safe answer."""
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.question}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": safe_answer(example, policy)}]}
    return SafetyRow(
        row_id=example.row_id,
        images=(example.image,),
        messages=[question, answer],
        category=example.category,
        level=example.level,
        source="picture world",
    )


def reaction(answer: str) -> Reaction:
    """The kind of an answer, by its first words: in the picture world each kind begins in its own way."""
    for first_words, kind in (
        ("I can't help", "refusal"),
        ("Warning:", "warning"),
        ("Careful:", "caution"),
        ("Sure.", "compliance"),
    ):
        if answer.startswith(first_words):
            return kind
    return "answer"


def _guarded(action: str, category: int, policy: SafetyPolicy) -> str | None:
    name = CATEGORY_NAMES[category]
    return {
        "allow": None,
        "caution": CAUTION.replace("{category}", name),
        "warn": WARNING.replace("{category}", name),
        "refuse": policy.refusal(name),
    }[action]
