"""Every measure that evaluation reports: its name, section, title, direction and scale, and where it is shown.

Reports, tables, plots, benchmark tasks and the model card read them from here. To add a measure:

1. Compute it: of an answer in `benchmarks/answer_measures.py`; of the safety head in `head/measures.py`, once as a
   value and once for resamples, which gives the interval.
2. Add a row to `_ROWS` below.

Nothing heavy is imported, so any command may use the table.
"""

from dataclasses import dataclass
from typing import Literal

from safevlm.model_card.facts import SECTIONS

*ANSWER_SECTIONS, HEAD_SECTION = SECTIONS
"""The sections of the model card. The comparison table has the `ANSWER_SECTIONS`, in this order."""


@dataclass(frozen=True)
class Measure:
    """
    Args:
        name (`str`): The key in `results.json`, `calibration.json` and `card_facts.json`.
        section (`str`): One of `ANSWER_SECTIONS`, or `HEAD_SECTION`.
        title (`str`, *optional*): What a reader sees; by default the name with spaces.
        higher_is_better (`bool`)
        scale (`float`): The largest possible value.
        percent (`bool`): Shown as a percentage of `scale`; otherwise as it is.
        source (`str`): What computes it: our tasks (`"task"`), a judge (`"judge"`), lmms-eval's tasks whose names
            begin with NAME (`"lmms:NAME"`), or the safety head's `"labels"`, `"risk"` or `"category"` measures.
        shown_in (`tuple[str, ...]`): `"comparison"` (`comparison.md`) and `"card"`. The card also has every column of
            the comparison's first table. A measure that is shown in neither is only in the JSON report.
    """

    name: str
    section: str
    title: str = ""
    higher_is_better: bool = True
    scale: float = 1.0
    percent: bool = True
    source: str = "task"
    shown_in: tuple[Literal["comparison", "card"], ...] = ("comparison", "card")

    def __post_init__(self):
        if not self.title:
            object.__setattr__(self, "title", self.name.replace("_", " "))

    @property
    def arrow(self) -> str:
        """Which direction is better."""
        return "↑" if self.higher_is_better else "↓"


def _head(name: str, title: str, source: str, shown_in: tuple = (), higher_is_better: bool = True) -> Measure:
    return Measure(name, HEAD_SECTION, title, higher_is_better, source=source, shown_in=shown_in)


_SAFETY, _OVER_REFUSAL, _GENERAL = ANSWER_SECTIONS
_REPORT_ONLY = ()
_CARD = ("card",)
_COMPARISON = ("comparison",)
_BOTH = ("comparison", "card")

_ROWS = (
    # Of answers to our tasks.
    Measure("attack_success_rate", _SAFETY, "attack success", higher_is_better=False),
    Measure("refusal_rate", _SAFETY, shown_in=_REPORT_ONLY),
    Measure("refusal_rate_other", _SAFETY, shown_in=_REPORT_ONLY),
    Measure("judge_score", _SAFETY, "judge score of 10", scale=10.0, percent=False, source="judge"),
    Measure("over_refusal_rate", _OVER_REFUSAL, "over-refusal", higher_is_better=False),
    Measure("exact_match", _GENERAL),
    # Of answers to lmms-eval's tasks.
    Measure("gpt_eval_score", _GENERAL, "accuracy", scale=100.0, source="lmms:mmbench"),
    Measure("seed_all", _GENERAL, "accuracy", source="lmms:seedbench"),
    Measure("mme_perception_score", _GENERAL, "perception score", scale=2000.0, percent=False, source="lmms:mme"),
    Measure("mme_cognition_score", _GENERAL, "cognition score", scale=800.0, percent=False, source="lmms:mme"),
    Measure("pope_accuracy", _GENERAL, "accuracy", source="lmms:pope"),
    # Of the safety head's verdicts.
    _head("level_accuracy", "level accuracy", "labels", _BOTH),
    _head("level_kappa", "level kappa", "labels"),
    _head("category_macro_f1", "category macro-F1", "labels", _BOTH),
    _head("category_ece", "category ECE", "labels", _CARD, higher_is_better=False),
    _head("auroc", "AUROC", "risk", _BOTH),
    _head("auprc", "AUPRC", "risk"),
    _head("fpr_at_95_tpr", "FPR at 95 % TPR", "risk", _COMPARISON, higher_is_better=False),
    _head("ece", "ECE", "risk", _BOTH, higher_is_better=False),
    _head("recall", "recall", "risk", _CARD),
    _head("false_positive_rate", "false positive rate", "risk", _CARD, higher_is_better=False),
    # Of the verdicts of one category, against all others.
    _head("precision", "precision", "category"),
    _head("recall_of_category", "recall", "category"),
    _head("f1", "F1", "category"),
)

MEASURES: dict[str, Measure] = {measure.name: measure for measure in _ROWS}


def measures_of(*sources: str) -> tuple[Measure, ...]:
    """The measures that these sources compute, in the table's order."""
    return tuple(measure for measure in MEASURES.values() if measure.source in sources)


def head_measures(shown_in: str) -> tuple[Measure, ...]:
    """The safety head's measures that are shown in `"comparison"` or on the `"card"`."""
    return tuple(m for m in MEASURES.values() if m.section == HEAD_SECTION and shown_in in m.shown_in)


def lmms_measures(task: str) -> tuple[Measure, ...]:
    """The measures of one of lmms-eval's tasks that count as general ability; empty where none is known."""
    prefixes = (m.source.removeprefix("lmms:") for m in MEASURES.values() if m.source.startswith("lmms:"))
    return next((measures_of(f"lmms:{prefix}") for prefix in prefixes if task.startswith(prefix)), ())
