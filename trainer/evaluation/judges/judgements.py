"""What goes into a judge and what comes out."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from safevlm.trainer.data.images import ImageSource

from .prompt import Rubric, find_rubric


@dataclass(frozen=True)
class JudgeItem:
    """
    One answer to be judged.

    Args:
        item_id (`str`): Names the item in verdicts and errors.
        rubric (`Rubric` or `str`): A rubric, the name of a shipped one or of the task it is for.
        question, answer (`str`): What the model was asked and what it answered.
        image (`ImageSource`, *optional*): What it saw, shown to judges that see.
        reference (`str`, *optional*): A right answer, or what a right answer must do.
    """

    item_id: str
    rubric: Rubric | str
    question: str
    answer: str
    image: ImageSource | None = None
    reference: str | None = None

    def __post_init__(self):
        for name in ("item_id", "question", "answer"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"Item {self.item_id!r}: `{name}` must be a string, got {getattr(self, name)!r}.")
        if isinstance(self.rubric, str):
            object.__setattr__(self, "rubric", find_rubric(self.rubric))


@dataclass(frozen=True)
class Verdict:
    """
    Args:
        item_id, rubric (`str`): What was judged by what.
        judge (`str`): Kind and name of the judge, such as `"openai:gpt-4o"` or `"rules"`.
        status (`str`): `"scored"`; `"unparseable"` (no reply in the demanded format, though asked twice); or
            `"rejected"` (the endpoint refused the item, such as by its content filter).
        score (`int | None`): 0 to 10, only where scored.
        reason (`str`): The judge's reason, or why the endpoint refused.
        reply (`str`): The judge's last reply as it came.
        num_reminders (`int`): How often the judge was reminded of the format.
        usage (`dict`): What the endpoint reports: `prompt_tokens`, `completion_tokens`, and `cost` where it says so.
    """

    item_id: str
    rubric: str
    judge: str
    status: Literal["scored", "unparseable", "rejected"]
    score: int | None = None
    reason: str = ""
    reply: str = ""
    num_reminders: int = 0
    usage: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if self.status not in ("scored", "unparseable", "rejected") or (self.score is None) == (
            self.status == "scored"
        ):
            raise ValueError(f"A verdict of status {self.status!r} cannot have the score {self.score!r}.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def add_usage(usages: Iterable[dict[str, float]]) -> dict[str, float]:
    """The sums, name by name; empty where nothing was reported."""
    total: dict[str, float] = {}
    for usage in usages:
        for name, value in usage.items():
            total[name] = total.get(name, 0) + value
    return total
