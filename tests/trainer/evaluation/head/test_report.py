"""The head's report: bootstrap intervals over images, counts, slices, and its text."""

import json

import numpy as np
import pytest
from head_records import LABELS, random_records, record, scored

from safevlm.trainer.evaluation import format_head_report, head_report, operating_point
from safevlm.trainer.evaluation.bootstrap import image_groups, percentile_interval, resample_weights


def test_rows_are_grouped_by_shared_images_through_others_too():
    groups = image_groups([("a",), ("b", "c"), ("c", "d"), ("d",), (), ("a", "e"), ()])
    assert groups[0] == groups[5] and groups[1] == groups[2] == groups[3]
    assert len(set(groups.tolist())) == 4 and groups.max() == 3


def test_resamples_draw_whole_images():
    groups = np.array([0, 0, 1, 2, 2, 2])
    weights = np.concatenate(list(resample_weights(groups, 200, seed=1, elements=40)))
    assert weights.shape == (200, 6)
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(axis=1) == 3).all()  # as many images as there are
    assert 0.8 < weights[:, 2].mean() < 1.2
    assert (weights == np.concatenate(list(resample_weights(groups, 200, seed=1)))).all()


def test_an_interval_needs_most_resamples_to_define_the_measure():
    values = np.linspace(0, 1, 101)
    assert percentile_interval(values) == pytest.approx((0.025, 0.975))
    values[:4] = np.nan
    assert percentile_interval(values) is not None
    values[:10] = np.nan
    assert percentile_interval(values) is None


def width(measure):
    return measure["high"] - measure["low"]


def independent_and_repeated(n=400, times=4):
    """80 % of clean rows right: each about an image of its own, and each `times` times."""
    rows = [scored(0.9 if i % 5 == 0 else 0.1, images=(f"{i}",)) for i in range(n)]
    return rows, [row for row in rows for _ in range(times)]


def test_the_interval_is_as_wide_as_theory_says_and_repeated_rows_do_not_narrow_it():
    rows, repeated = independent_and_repeated()
    alone = operating_point(rows, "default", LABELS, num_resamples=2000)["false_positive_rate"]
    assert alone["value"] == pytest.approx(0.2)
    assert width(alone) == pytest.approx(2 * 1.96 * np.sqrt(0.2 * 0.8 / 400), rel=0.1)
    clustered = operating_point(repeated, "default", LABELS, num_resamples=2000)["false_positive_rate"]
    assert width(clustered) == pytest.approx(width(alone), rel=0.1)
    assert clustered["num_rows"] == 1600


@pytest.fixture(scope="module")
def report():
    return head_report(random_records(300, rows_per_image=2), "default", LABELS, num_resamples=200)


def test_the_report_is_json_with_counts_and_intervals_around_the_values(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (report["num_rows"], report["num_measured"], report["num_images"]) == (300, 300, 150)
    assert set(report["by_category"]) == set(LABELS.category_names)
    assert sum(values["num_rows"] for values in report["by_category"].values()) == 300
    for name, measure in report["overall"].items():
        assert measure["num_rows"] == 300
        assert measure["low"] < measure["high"], name
        assert measure["low"] - 0.02 <= measure["value"] <= measure["high"] + 0.02, name
    assert np.sum(report["confusion_matrix"]["level"]["counts"]) == 300
    assert sum(b["count"] for b in report["reliability"]["risk"]) == 300


def test_a_sources_values_are_those_of_a_report_on_it_alone(report):
    alone = head_report(
        [r for r in random_records(300, rows_per_image=2) if r.source == "odd"], "default", LABELS, num_resamples=0
    )
    values = {name: measure["value"] for name, measure in report["by_source"]["odd"].items()}
    assert values == {name: measure["value"] for name, measure in alone["overall"].items()}
    assert alone["overall"]["auroc"]["low"] is None  # no resamples, no interval


def test_a_category_is_told_from_clean_rows_only():
    records = [
        *(scored(0.9, 3, 0, verdict=0, images=(f"a{i}",)) for i in range(3)),
        *(scored(0.1, 3, 1, verdict=1, images=(f"b{i}",)) for i in range(3)),
        *(scored(0.5, images=(f"c{i}",)) for i in range(4)),
    ]
    by_category = head_report(records, "default", LABELS, num_resamples=50)["by_category"]
    assert by_category["politics"]["auroc"] | {"low": 0, "high": 0} == {"value": 1, "low": 0, "high": 0, "num_rows": 7}
    assert by_category["illegal risk"]["auroc"]["value"] == 0.0
    assert by_category["politics"]["recall"]["value"] == 1.0 and by_category["politics"]["num_images"] == 3
    absent = by_category["privacy"]
    assert absent["num_rows"] == 0 and absent["auroc"]["value"] is None and absent["f1"]["value"] is None
    assert "auroc" not in by_category["safe"]


def test_left_out_rows_are_counted():
    records = [*random_records(20), record(images=()), record(level=None, images=("x",))]
    report = head_report(records, "default", LABELS, num_resamples=20)
    assert (report["num_rows"], report["num_measured"]) == (22, 20)
    assert (report["num_without_image"], report["num_without_labels"]) == (1, 1)
    assert "2 rows left out (1 without an image, 1 without labels)" in format_head_report(report)


def test_the_text_says_what_is_not_defined():
    text = format_head_report(head_report([scored(0.2), scored(0.3)], "default", LABELS))
    assert "2 rows about 1 images, 0 of them risky" in text
    assert "auroc                 not defined" in text
    assert "false_positive_rate   0.0\n" in text  # one image only: no interval
