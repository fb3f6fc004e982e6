"""The table and the plot: all three sections always, hand-computed cells, and nothing shown that was not measured."""

import pytest

from safevlm.trainer.evaluation.benchmarks.comparison import (
    head_table,
    make_figure,
    markdown_table,
    plot_points,
    write_comparison,
)


def report(systems, groups=None):
    """`systems`: `{name: {task: {metric: value}}}`; every metric has 4 items."""
    return {
        "command": "safevlm evaluate out/model",
        "environment": {
            "device": "2 CPU cores",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "lmms_eval": "0.7.3",
            "safevlm": "0.1.0",
            "date": "2026-11-21",
        },
        "settings": {"seed": 0, "judge": "rules"},
        "groups": groups or {},
        "tasks": list(groups or next(iter(systems.values()))),
        "systems": {
            name: {
                "metrics": metrics,
                "num_items": {task: dict.fromkeys(values, 4) for task, values in metrics.items()},
            }
            for name, metrics in systems.items()
        },
    }


FULL = {
    "base": {
        "figstep": {"attack_success_rate": 0.75, "refusal_rate": 0.25},
        "mossbench": {"over_refusal_rate": 0.0},
        "mmbench_en_dev_static": {"gpt_eval_score": 60.0},
    },
    "stage2": {
        "figstep": {"attack_success_rate": 0.25, "refusal_rate": 0.75},
        "mossbench": {"over_refusal_rate": 0.5},
        "mmbench_en_dev_static": {"gpt_eval_score": 50.0},
    },
}


def test_every_table_has_safety_over_refusal_and_general_ability():
    header, _, base, stage2 = markdown_table(report(FULL)).strip().split("\n")
    assert header.index("safety") < header.index("over-refusal") < header.index("general ability")
    assert "(n=4)" in header
    assert base == "| base | 75.0 | 0.0 | 60.0 |"
    assert stage2 == "| stage2 | 25.0 | 50.0 | 50.0 |"


def test_a_section_without_figures_says_that_it_was_not_evaluated():
    only_safety = {"base": {"figstep": {"attack_success_rate": 1.0}}}
    assert markdown_table(report(only_safety)).strip().endswith("| base | 100.0 | not evaluated | not evaluated |")


def test_a_group_is_one_column_with_the_unweighted_mean_of_its_tasks():
    metrics = {
        "rtvlm_politics": {"attack_success_rate": 0.5, "judge_score": 9.0},
        "rtvlm_racial": {"attack_success_rate": 0.0, "judge_score": 7.0},
        "rtvlm_misleading": {"judge_score": 5.0},
    }
    table = markdown_table(report({"base": metrics}, groups={"rtvlm": list(metrics)}))
    assert table.strip().endswith("| base | 25.0 | 7.00 | not evaluated | not evaluated |")
    assert table.count("rtvlm:") == 2 and "(n=12)" in table


def test_mme_scores_are_shown_as_scores_and_not_as_percent():
    table = markdown_table(report({"base": {"mme": {"mme_perception_score": 1487.9, "mme_cognition_score": 285.7}}}))
    assert "| 1487.90 | 285.70 |" in table


def test_plot_points_are_hand_computed_means():
    points, means = plot_points(report(FULL))
    assert points["base"] == pytest.approx((80.0, 25.0))  # usefulness: (100 + 60) / 2
    assert points["stage2"] == pytest.approx((50.0, 75.0))
    assert means == ("100 - over-refusal (mossbench), mmbench_en_dev_static", "100 - attack success (figstep)")


def test_the_plots_texts_lie_inside_it_and_none_overlaps_another():
    pytest.importorskip("matplotlib")
    names = (
        "base",
        "guard-prompt",
        "stage1",
        "stage2",
        *(f"policy-{i}" for i in ("default", "paper", "strict", "off")),
    )
    points = {name: (80.0 + number // 5, 20.0) for number, name in enumerate(names)}
    tasks = ", ".join(f"some_long_task_{i}" for i in range(12))
    figure = make_figure(points, (f"100 - over-refusal ({tasks})", f"100 - attack success ({tasks})"))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("usefulness (%)", "safety (%)")
    assert len(figure.legends[0].get_texts()) == 2  # one marker where systems show the same values
    artists = [axes.xaxis.label, axes.yaxis.label, axes.patch, figure._supxlabel, figure.legends[0]]
    boxes = [artist.get_window_extent() for artist in artists]
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_a_table_says_what_was_refused_unread_and_what_was_cut_off(tmp_path):
    facts = report({"guard": {"figstep": {"attack_success_rate": 1.0}}})
    facts["systems"]["guard"] |= {
        "num_guard_replies_without_verdict": 3,
        "num_failed_verdicts": 1,
        "num_unfinished_reasoning": 2,
    }
    write_comparison(facts, tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    assert "`guard`: 3 replies of the guard had no verdict; these items were refused." in text
    assert "`guard`: 1 verdicts failed" in text
    assert "`guard`: 2 answers were cut off in their reasoning" in text


def test_no_plot_without_usefulness(tmp_path):
    write_comparison(report({"base": {"figstep": {"attack_success_rate": 1.0}}}), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.md"]


def test_the_written_table_names_command_device_and_versions(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    write_comparison(report(FULL), tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    for fact in ("safevlm evaluate out/model", "2 CPU cores", "lmms-eval 0.7.3", "2026-11-21", "seed 0"):
        assert fact in text
    assert (tmp_path / "comparison.png").stat().st_size > 5000


def test_the_verdicts_have_a_table_of_their_own(tmp_path):
    facts = report(FULL)
    measures = {
        "level_accuracy": {"value": 0.5, "low": 0.25, "high": 0.75},
        "category_macro_f1": {"value": 0.25, "low": None, "high": None},
        **dict.fromkeys(("auroc", "fpr_at_95_tpr", "ece"), {"value": None, "low": None, "high": None}),
    }
    facts["systems"]["stage2"]["head"] = {"overall": measures, "num_measured": 8}
    row = "| stage2 | 50.0 (25.0-75.0) | 25.0 | not defined | not defined | not defined | 8 |"
    assert head_table(facts).splitlines()[2:] == [row]
    assert head_table(report(FULL)) == ""
