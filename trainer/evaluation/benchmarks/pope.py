"""POPE (arXiv 2305.10355): yes-or-no questions about objects, scored as its `evaluate.py` does.

An answer counts as "no" if "No", "no" or "not" is a word of its first sentence (up to the first full stop, without
commas, words between single spaces), and otherwise as "yes": "There isn't", "NO" and an empty answer are "yes". That
is crude, but it is how the published figures were computed. `num_unclear` counts the answers that contain none of the
words "yes", "no" and "not", and so are "yes" by this rule alone.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safevlm.trainer.evaluation.eval_extra import require

_CLEAR = re.compile(r"\b(?:yes|no|not)\b", re.IGNORECASE)


@dataclass(frozen=True)
class PopeQuestion:
    """A line of a label file."""

    question_id: int
    image: str
    question: str
    label: str


def read_pope_labels(path: str | Path) -> list[PopeQuestion]:
    """Reads a label file such as `coco_pope_random.json` (JSON lines)."""
    questions = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question = PopeQuestion(row["question_id"], row["image"], row["text"], row["label"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: not a POPE question with question_id, image, text and label ({error})."
            ) from None
        if question.label not in ("yes", "no"):
            raise ValueError(f"{path}, line {number}: `label` must be 'yes' or 'no', got {question.label!r}.")
        questions.append(question)
    if not questions:
        raise ValueError(f"{path} has no questions.")
    return questions


def pope_answer(answer: str) -> str:
    """`"yes"` or `"no"`, by the published rule."""
    words = answer.strip().split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_metrics(labels: Sequence[str], answers: Sequence[str]) -> dict[str, float | int | None]:
    """
    Args:
        labels (`list[str]`): `"yes"` or `"no"`.
        answers (`list[str]`): The model's answers, in the same order.

    Returns:
        `accuracy`, `precision`, `recall`, `f1` of "yes" (0 where undefined) and `yes_ratio`, all in [0, 1]; the counts
        `num_true_positives`, `num_false_positives`, `num_true_negatives`, `num_false_negatives`, `num_samples` and
        `num_unclear`.
    """
    require("sklearn", "POPE metrics need")
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    labels, answers = list(labels), list(answers)
    if len(labels) != len(answers) or not labels:
        raise ValueError(f"`answers` must have one entry per label: got {len(answers)} for {len(labels)} labels.")
    if unknown := sorted({str(label) for label in labels} - {"yes", "no"}):
        raise ValueError(f"`labels` must be 'yes' or 'no', got {', '.join(map(repr, unknown))}.")
    predictions = [pope_answer(answer) for answer in answers]
    (tn, fp), (fn, tp) = confusion_matrix(labels, predictions, labels=["no", "yes"]).tolist()
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predictions, pos_label="yes", labels=["yes"], average="binary", zero_division=0
    )
    return {
        "accuracy": (tp + tn) / len(labels),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "yes_ratio": predictions.count("yes") / len(labels),
        "num_true_positives": tp,
        "num_false_positives": fp,
        "num_true_negatives": tn,
        "num_false_negatives": fn,
        "num_samples": len(labels),
        "num_unclear": sum(_CLEAR.search(answer) is None for answer in answers),
    }
