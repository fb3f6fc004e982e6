"""Measures [`RefusalDetector`] against human labels (XSTest), and fits its weights.

XSTest has 450 prompts, five models' answers to each, and a human label per answer. The shipped weights are fitted on
all answers, so no figure here comes from them. Instead, each fit is repeated on a part and measured on answers to
prompts that it has not seen:

- `cross_validate`: ten folds over prompts. A safe prompt and its unsafe twin ("kill a process", "kill a person") are
  always in the same fold.
- `cross_validate(new_model=True)`: the same folds, and none of the measured model's answers are in the fit either.
- `validate_half`: fitted on the even-numbered prompts, measured on the odd-numbered ones. Patterns and settings were
  chosen on even-numbered prompts only, so nothing was developed on the measured answers.

    python -m safevlm.trainer.evaluation.refusals.validation --xstest ../shared/data/xstest

prints the table (in about three minutes); `--fit` writes new weights.
"""

import argparse
import csv
import json
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from safevlm.trainer.evaluation.eval_extra import require

from .detector import WEIGHTS_PATH, LinearModel, RefusalDetector, RefusalLabel, RefusalVerdict
from .features import AnswerFeatures

LABELS: dict[str, RefusalLabel] = {
    "1_full_compliance": "compliance",
    "2_full_refusal": "refusal",
    "3_partial_refusal": "partial_refusal",
}
INVERSE_REGULARIZATION, MIN_COUNT, MIN_WEIGHT = 30.0, 3, 0.2
"""Chosen by cross-validation over the even-numbered prompts."""
NUM_FOLDS = 10


@dataclass(frozen=True)
class LabelledAnswer:
    """One row of XSTest's completion files."""

    model: str
    prompt_id: int
    prompt: str
    answer: str
    label: RefusalLabel
    annotations: tuple[RefusalLabel, RefusalLabel]

    @property
    def fold(self) -> int:
        """The fold that holds the prompt out. XSTest's blocks of 50 are 25 safe prompts and their 25 unsafe twins."""
        block, place = divmod(self.prompt_id - 1, 50)
        return (block * 25 + place % 25) * 7 % NUM_FOLDS

    @cached_property
    def features(self) -> dict[str, float]:
        return AnswerFeatures(self.prompt, self.answer).to_dict()


def read_xstest(folder: str | Path) -> list[LabelledAnswer]:
    """Reads `model_completions/xstest_v2_completions_<model>.csv` below `folder`."""
    paths = sorted(Path(folder).glob("model_completions/xstest_v2_completions_*.csv"))
    if not paths:
        raise FileNotFoundError(
            f"--xstest {str(folder)!r} has no model_completions/xstest_v2_completions_*.csv; "
            "give a clone of github.com/paul-rottger/xstest."
        )
    rows = []
    for path in paths:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                rows.append(
                    LabelledAnswer(
                        model=path.stem.rsplit("_", 1)[1],
                        prompt_id=int(row["id"].rsplit("-", 1)[1]),
                        prompt=row["prompt"],
                        answer=row["completion"],
                        label=LABELS[row["final_label"]],
                        annotations=(LABELS[row["annotation_1"]], LABELS[row["annotation_2"]]),
                    )
                )
    return rows


def fit(rows: list[LabelledAnswer]) -> dict[str, LinearModel]:
    """Both linear models, fitted on `rows` by logistic regression."""
    require("sklearn", "Fitting the refusal detector needs")
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression

    def fit_one(selected: list[LabelledAnswer], positive: list[bool]) -> LinearModel:
        features = [row.features for row in selected]
        counts = Counter(name for row in features for name in row)
        vectorizer = DictVectorizer()
        matrix = vectorizer.fit_transform(
            [{name: value for name, value in row.items() if counts[name] >= MIN_COUNT} for row in features]
        )
        model = LogisticRegression(C=INVERSE_REGULARIZATION, max_iter=3000).fit(matrix, positive)
        weights = zip(vectorizer.get_feature_names_out(), model.coef_[0].tolist(), strict=True)
        return LinearModel(
            round(float(model.intercept_[0]), 3),
            {name: round(weight, 2) for name, weight in sorted(weights) if abs(weight) >= MIN_WEIGHT},
        )

    refusals = [row for row in rows if row.label != "compliance"]
    return {
        "refusal": fit_one(rows, [row.label != "compliance" for row in rows]),
        "partial": fit_one(refusals, [row.label == "partial_refusal" for row in refusals]),
    }


def wilson_interval(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % Wilson interval of a proportion, both ends in [0, 1]."""
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5 / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def measure(rows: list[LabelledAnswer], verdicts: list[RefusalVerdict]) -> dict[str, float | int | tuple]:
    """`refusal_accuracy` (full or partial refusal against compliance) with its interval, and `three_way_accuracy`."""
    pairs = list(zip(rows, verdicts, strict=True))
    right = sum(verdict.is_refusal == (row.label != "compliance") for row, verdict in pairs)
    return {
        "num_samples": len(rows),
        "num_correct": right,
        "refusal_accuracy": right / len(rows),
        "interval": wilson_interval(right, len(rows)),
        "false_refusals": sum(verdict.is_refusal and row.label == "compliance" for row, verdict in pairs),
        "missed_refusals": sum(not verdict.is_refusal and row.label != "compliance" for row, verdict in pairs),
        "three_way_accuracy": sum(verdict.label == row.label for row, verdict in pairs) / len(rows),
    }


def held_out_verdicts(fit_rows: list[LabelledAnswer], rows: list[LabelledAnswer]) -> list[RefusalVerdict]:
    """What a detector fitted on `fit_rows` says about `rows`."""
    detector = RefusalDetector(fit(fit_rows))
    return [detector.classify(row.prompt, row.answer) for row in rows]


def validate_half(rows: list[LabelledAnswer]) -> dict[str, dict]:
    """Fitted on even-numbered prompts, measured on odd-numbered ones, per model."""
    odd = [row for row in rows if row.prompt_id % 2]
    verdicts = held_out_verdicts([row for row in rows if not row.prompt_id % 2], odd)
    return {model: measure(*_of_model(model, odd, verdicts)) for model in sorted({row.model for row in rows})}


def cross_validate(rows: list[LabelledAnswer], new_model: bool = False) -> dict[str, dict]:
    """Ten folds over prompts, per model. With `new_model`, the measured model's answers are never in the fit."""
    models = sorted({row.model for row in rows})
    measured, verdicts = [], []
    groups = [{model} for model in models] if new_model else [set(models)]
    steps = [(group, fold) for group in groups for fold in range(NUM_FOLDS)]
    for group, fold in tqdm(steps, desc="new model" if new_model else "cross-validation", disable=None):
        held_out = [row for row in rows if row.fold == fold and row.model in group]
        kept = [row for row in rows if row.fold != fold and not (new_model and row.model in group)]
        measured += held_out
        verdicts += held_out_verdicts(kept, held_out)
    return {model: measure(*_of_model(model, measured, verdicts)) for model in models}


def annotator_agreement(rows: list[LabelledAnswer]) -> dict[str, float]:
    """Share of answers on which the two annotators agree, per model: about the best accuracy that can be reached."""
    agreement = {}
    for model in sorted({row.model for row in rows}):
        pairs = [row.annotations for row in rows if row.model == model]
        agreement[model] = sum((a == "compliance") == (b == "compliance") for a, b in pairs) / len(pairs)
    return agreement


def to_markdown(crossed: dict[str, dict], new: dict[str, dict], half: dict[str, dict], agreement: dict) -> str:
    lines = [
        "| answers of | accuracy, held-out prompts | 95 % interval | false / missed refusals | three-way "
        "| new model | odd prompts, fitted on even | annotators agree |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, result in crossed.items():
        low, high = result["interval"]
        lines.append(
            f"| {model} | **{result['refusal_accuracy']:.3f}** ({result['num_correct']} of {result['num_samples']}) "
            f"| {low:.3f} to {high:.3f} | {result['false_refusals']} / {result['missed_refusals']} "
            f"| {result['three_way_accuracy']:.3f} | {new[model]['refusal_accuracy']:.3f} "
            f"| {half[model]['refusal_accuracy']:.3f} ({half[model]['num_correct']} of {half[model]['num_samples']}) "
            f"| {agreement[model]:.3f} |"
        )
    return "\n".join(lines) + "\n"


def write_weights(models: dict[str, LinearModel], num_samples: int, path: Path = WEIGHTS_PATH):
    data = {
        "fitted_on": f"XSTest v2 completions, {num_samples} answers with human labels",
        "fitted_by": "python -m safevlm.trainer.evaluation.refusals.validation --fit",
        **{name: {"bias": model.bias, "weights": model.weights} for name, model in models.items()},
    }
    path.write_text(json.dumps(data, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--xstest", required=True, help="folder with XSTest's model_completions/")
    parser.add_argument("--fit", action="store_true", help="fit the weights on all answers and write them, no table")
    options = parser.parse_args(arguments)
    rows = read_xstest(options.xstest)
    if options.fit:
        write_weights(fit(rows), len(rows))
        sys.stdout.write(f"Wrote {WEIGHTS_PATH}\n")
        return 0
    crossed, new, half = cross_validate(rows), cross_validate(rows, new_model=True), validate_half(rows)
    sys.stdout.write(to_markdown(crossed, new, half, annotator_agreement(rows)))
    return 0


def _of_model(model: str, rows: list[LabelledAnswer], verdicts: list[RefusalVerdict]) -> tuple[list, list]:
    chosen = [index for index, row in enumerate(rows) if row.model == model]
    return [rows[index] for index in chosen], [verdicts[index] for index in chosen]


if __name__ == "__main__":
    raise SystemExit(main())
