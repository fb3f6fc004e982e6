"""What the safety head tells apart: the names of risk categories and levels, and the category that means "no risk"."""

from dataclasses import dataclass

IGNORE_INDEX = -100
"""The label id of rows without a label, such as clean instruction data in stage 2."""


@dataclass(frozen=True)
class SafetyLabels:
    """
    The categories and levels that the safety head tells apart, in the order of their ids. Defaults to the paper's.

    Args:
        category_names (`tuple[str, ...]`): Risk categories, one of which means "no risk".
        level_names (`tuple[str, ...]`): Risk levels; the first means "no risk".
        safe_category (`str`): The category that means "no risk".

    Raises:
        `ValueError`: A name is not a text or occurs twice, a list has fewer than two names, or `safe_category` is
            not one of the categories.
    """

    category_names: tuple[str, ...] = (
        "politics",
        "illegal risk",
        "insults and bullying",
        "fairness",
        "privacy",
        "misleading",
        "safe",
    )
    level_names: tuple[str, ...] = ("none", "low", "medium", "high")
    safe_category: str = "safe"

    def __post_init__(self):
        for name in ("category_names", "level_names"):
            labels = getattr(self, name)
            if not isinstance(labels, (list, tuple)) or not all(isinstance(n, str) and n.strip() for n in labels):
                raise ValueError(
                    f"`{name}` must be a list of texts, got {labels!r}; in YAML quote yes, no and numbers."
                )
            if len(labels) < 2:
                raise ValueError(f"`{name}` must have at least two entries, got {labels!r}.")
            keys = [" ".join(label.split()).casefold() for label in labels]
            if repeated := [label for label, key in zip(labels, keys, strict=True) if keys.count(key) > 1]:
                raise ValueError(f"`{name}` has the same name more than once: {repeated}; give each label its own.")
            object.__setattr__(self, name, tuple(labels))
        if self.safe_category not in self.category_names:
            raise ValueError(f"`safe_category` {self.safe_category!r} is not among {list(self.category_names)}.")

    @property
    def safe_category_id(self) -> int:
        return self.category_names.index(self.safe_category)

    @property
    def risky_categories(self) -> list[str]:
        return [name for name in self.category_names if name != self.safe_category]


PAPER_LABELS = SafetyLabels()
