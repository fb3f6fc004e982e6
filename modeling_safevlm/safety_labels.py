"""What the safety head tells apart: the names of risk categories and levels, and which category is the safe one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SafetyLabels:
    """
    Labels in the order of their ids. The defaults are the paper's, which stand here and nowhere else.

    Args:
        category_names (`tuple[str, ...]`): Risk categories, one of them without risk.
        level_names (`tuple[str, ...]`): Risk levels; the first is "no risk".
        safe_category (`str`): The category without risk.

    Raises:
        `ValueError`: A name that is no text or occurs twice, fewer than two names, or an unknown `safe_category`.
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
        for field in ("category_names", "level_names"):
            names = getattr(self, field)
            if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) and n.strip() for n in names):
                raise ValueError(
                    f"`{field}` must be a list of texts, got {names!r}; in YAML quote yes, no and numbers."
                )
            if len(names) < 2:
                raise ValueError(f"`{field}` must have at least two entries, got {names!r}.")
            seen = [" ".join(name.split()).casefold() for name in names]
            if twice := [name for name, key in zip(names, seen, strict=True) if seen.count(key) > 1]:
                raise ValueError(f"`{field}` has the same name more than once: {twice}; give each label its own.")
            object.__setattr__(self, field, tuple(names))
        if self.safe_category not in self.category_names:
            raise ValueError(f"`safe_category` {self.safe_category!r} is not among {list(self.category_names)}.")

    @property
    def safe_category_id(self) -> int:
        return self.category_names.index(self.safe_category)

    @property
    def risky_categories(self) -> list[str]:
        return [name for name in self.category_names if name != self.safe_category]


PAPER_LABELS = SafetyLabels()
