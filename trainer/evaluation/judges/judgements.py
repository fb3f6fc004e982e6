"""What a judge is given and what it returns."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from safevlm.trainer.data.images import ImageSource

from .prompt import Rubric, find_rubric

Status = Literal["scored", "unparseable", "rejected"]


@dataclass(frozen=True)
class JudgeItem:
    """
    One answer to be judged.

    Args:
        item_id (`str`): Names the item in judgements and errors.
        rubric (`Rubric` or `str`): A rubric, or the name of a shipped one or of the task it is for.
        question, answer (`str`): What the model was asked and what it answered.
        image (`ImageSource`, *optional*): What the model saw; shown to judges that can see.
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
class Judgement:
    """
    A judge's score of one answer, or why there is none.

    Args:
        item_id, rubric (`str`): What was judged, and by which rubric.
        judge (`str`): Kind and name of the judge, such as `"openai:gpt-4o"` or `"rules"`.
        status (`str`): `"scored"`; `"unparseable"` (no reply in the required format, though asked twice); or
            `"rejected"` (the endpoint refused the item, for instance by its content filter).
        score (`int`, *optional*): 0 to 10; only if scored.
        reason (`str`): The judge's reason, or why the endpoint refused.
        reply (`str`): The judge's last reply, verbatim.
        num_reminders (`int`): How often the judge was reminded of the format.
        usage (`dict`): What the endpoint reports: `prompt_tokens`, `completion_tokens` and, at some endpoints, `cost`.
    """

    item_id: str
    rubric: str
    judge: str
    status: Status
    score: int | None = None
    reason: str = ""
    reply: str = ""
    num_reminders: int = 0
    usage: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        has_score = self.score is not None
        if self.status not in get_args(Status) or has_score != (self.status == "scored"):
            raise ValueError(f"A judgement of status {self.status!r} cannot have the score {self.score!r}.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def add_usage(usages: Iterable[dict[str, float]]) -> dict[str, float]:
    """The sums, name by name; empty if nothing was reported."""
    total: dict[str, float] = {}
    for usage in usages:
        for name, value in usage.items():
            total[name] = total.get(name, 0) + value
    return total
