"""Calibration: temperatures, thresholds for a false-positive rate or a cost, and honest halves."""

import copy
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build
from head_records import LABELS, SAFE, random_records, record, scored, with_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from published_templates import THINKING
from tiny import safe_model

from safevlm import SafeVlmConfig, SafeVlmForConditionalGeneration, SafeVlmProcessor
from safevlm.safety_policy import SafetyPolicy
from safevlm.safety_verdict import assess_logits, level_log_probabilities
from safevlm.trainer.evaluation import calibrate, store_policy
from safevlm.trainer.evaluation.head.calibration import split_by_image
from safevlm.trainer.evaluation.head.outcomes import head_outcomes
from safevlm.trainer.evaluation.head.temperatures import fit_temperature, fit_temperatures
from safevlm.trainer.evaluation.head.thresholds import MIN_ROWS, fit_thresholds


def verdicts(level_logits, category_logits, **policy):
    level_logits = torch.tensor(level_logits, dtype=torch.float32)
    category_logits = torch.tensor(category_logits, dtype=torch.float32)
    return assess_logits(level_logits, category_logits, SafetyPolicy(**policy), LABELS)


# -- temperatures ----------------------------------------------------------------------------------------------------

LOGITS = st.floats(-20, 20, width=32)
TEMPERATURES = st.floats(0.1, 10)  # TEMPERATURE_RANGE


@settings(deadline=None)
@given(st.lists(st.lists(LOGITS, min_size=4, max_size=4), min_size=2, max_size=12), TEMPERATURES)
def test_calibration_never_reorders_scores(level_logits, temperature):
    category_logits = [[0.0] * 7] * len(level_logits)
    before = verdicts(level_logits, category_logits).score.double().numpy()
    after = verdicts(level_logits, category_logits, level_temperature=temperature).score.double().numpy()
    clearly_lower = before[:, None] < before - 1e-6  # float32 tells scores near 1 apart up to 6e-8
    assert (after[:, None] <= after)[clearly_lower].all()


@settings(deadline=None)
@given(st.lists(LOGITS, min_size=4, max_size=4), st.lists(LOGITS, min_size=7, max_size=7), TEMPERATURES)
def test_a_temperature_keeps_the_order_within_a_row(level_logits, category_logits, temperature):
    one, other = (
        verdicts([level_logits], [category_logits], risk_threshold=0.0, **temperatures)
        for temperatures in ({}, {"level_temperature": temperature, "category_temperature": temperature})
    )
    for name in ("level", "category"):
        chosen, former = getattr(other, name), getattr(one, name)
        probabilities = getattr(one, f"{name}_probabilities")[0]
        assert chosen == former or probabilities[chosen] == pytest.approx(probabilities[former].item(), rel=1e-4)


def test_without_a_temperature_the_probabilities_are_the_soft_max():
    logits = torch.randn(50, 4) * 5
    torch.testing.assert_close(level_log_probabilities(logits, 1.0), logits.log_softmax(dim=-1))
    hot = level_log_probabilities(logits, 3.0).exp()
    torch.testing.assert_close(hot.sum(dim=-1), torch.ones(50))
    odds = torch.log(hot[:, 1:].sum(-1) / hot[:, 0])
    torch.testing.assert_close(odds, torch.log(logits.softmax(-1)[:, 1:].sum(-1) / logits.softmax(-1)[:, 0]) / 3)


def test_small_scores_stay_apart():
    scores = verdicts([[30.0, 0, 0, 0], [25.0, 0, 0, 0]], [[0.0] * 7] * 2).score
    assert 0 < scores[0] < scores[1] < 1e-9


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_made_the_labels_is_found(true_temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 4, generator=generator, dtype=torch.double)
    made = level_log_probabilities(logits, true_temperature).exp()
    labels = torch.multinomial(made, 1, generator=generator).squeeze(1)
    fitted = fit_temperature(lambda temperature: level_log_probabilities(logits, temperature), labels)
    assert fitted == pytest.approx(true_temperature, rel=0.05)


def test_the_policy_gets_the_temperature_that_its_probabilities_need():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(6_000, 4, generator=generator) + torch.tensor([0.0, 4, 4, 4])
    made = level_log_probabilities(logits, 4.0).exp()
    labels = torch.multinomial(made, 1, generator=generator).squeeze(1)
    rows = [
        record(level, 1 if level else SAFE, row, images=(str(i),))
        for i, (level, row) in enumerate(zip(labels.tolist(), logits.tolist(), strict=True))
    ]
    assert fit_temperatures(rows, SafetyPolicy(), LABELS, []).level_temperature == pytest.approx(4.0, rel=0.07)


def test_an_overconfident_head_gets_temperatures_above_one_and_a_lower_calibration_error():
    sharp = [
        with_logits(r, lambda logits: [4 * x for x in logits], lambda logits: [4 * x for x in logits])
        for r in random_records(600)
    ]
    result = calibrate(sharp, "default", LABELS, target_fpr=0.1, num_resamples=20)
    assert min(result.policy.level_temperature, result.policy.category_temperature) > 1.5
    before, after = (result.report[when]["overall"] for when in ("before", "after"))
    for name in ("ece", "category_ece"):
        assert after[name]["value"] < 0.9 * before[name]["value"]
    assert after["auroc"]["value"] == pytest.approx(before["auroc"]["value"], abs=1e-3)


def test_a_head_without_errors_keeps_its_temperatures_and_says_so():
    def sure(level, category):
        return record(level, category, np.eye(4)[level] * 9, np.eye(7)[category] * 9)

    notes = []
    policy = fit_temperatures([sure(0, SAFE), sure(2, 1), sure(3, 0)], SafetyPolicy(), LABELS, notes)
    assert (policy.level_temperature, policy.category_temperature) == (1.0, 1.0)
    assert "`level_temperature` stays 1: the head is right on all 3 rows" in notes[0] and len(notes) == 2


# -- thresholds ------------------------------------------------------------------------------------------------------


@st.composite
def fit_halves(draw):
    """Rows of random sharpness, so that scores overlap, separate, tie and saturate."""
    n = draw(st.integers(1, 120))
    seed = draw(st.integers(0, 10_000))
    sharpness = draw(st.sampled_from([0.0, 1.0, 5.0]))
    scale = draw(st.sampled_from([0.0, 1.0, 10.0]))
    few = draw(st.sampled_from([1, 2, 7]))  # so many categories are said
    readings = draw(st.sampled_from([1, 3]))  # so many images a row

    def said(logits):
        return [scale * x if c < few or c == SAFE else -99.0 for c, x in enumerate(logits)]

    single_readings = [
        with_logits(r, lambda logits: [scale * x for x in logits], said)
        for r in random_records(n * readings, seed, sharpness)
    ]
    return [
        replace(
            single_readings[i],
            level_logits=sum((r.level_logits for r in single_readings[i : i + readings]), ()),
            category_logits=sum((r.category_logits for r in single_readings[i : i + readings]), ()),
            whole_conversation=(False,) * readings,
        )
        for i in range(0, len(single_readings), readings)
    ]


@settings(deadline=None, max_examples=150)
@given(fit_halves(), st.sampled_from([0.0, 0.01, 0.05, 0.29, 0.5, 0.99]) | st.floats(0, 0.99))
def test_the_false_positive_rate_on_the_fit_half_is_at_most_the_target(rows, target):
    notes = []
    policy, about = fit_thresholds(rows, SafetyPolicy(), LABELS, target_fpr=target, notes=notes)
    outcomes = head_outcomes(rows, policy, LABELS)
    clean = ~outcomes.risky
    if not clean.any():
        return
    saturated = (outcomes.highest_scores[clean] == 1).mean() > target  # no threshold is above a score of 1
    assert outcomes.flagged[clean].mean() <= target or saturated
    assert saturated == any("out of reach" in note for note in notes) or not saturated
    for category, name in enumerate(LABELS.category_names):
        scores = outcomes.category_scores[clean, category]
        scores = scores[scores >= 0]
        if name in policy.category_risk_thresholds:
            assert len(scores) >= MIN_ROWS and about["categories"][name]["clean"] == len(scores)
            flagged = scores >= np.float32(policy.category_risk_thresholds[name])
            assert flagged.mean() <= target or (scores == 1).any()
        elif category != SAFE:
            assert about["categories"][name]["threshold"] == policy.risk_threshold
            assert any(note.startswith(repr(name)) for note in notes)


def test_rows_of_other_categories_that_every_threshold_flags_count_against_the_target():
    rows = [scored(0.55 + 0.01 * i, images=[str(i)]) for i in range(30)]
    rows += [scored(1 - 1e-12, verdict=1, images=[f"certain {i}"]) for i in range(10)]
    rows += [scored(0.9, level=3, category=0, images=[f"risky {i}"]) for i in range(5)]
    policy, _ = fit_thresholds(rows, SafetyPolicy(), LABELS, target_fpr=0.5, notes=(notes := []))
    outcomes = head_outcomes(rows, policy, LABELS)
    assert outcomes.flagged[~outcomes.risky].mean() <= 0.5
    assert not any("out of reach" in note for note in notes)


@settings(deadline=None, max_examples=100)
@given(fit_halves(), st.sampled_from([0.0, 0.1, 0.5]), st.floats(0, 1))
def test_no_other_single_threshold_within_the_target_catches_more(rows, target, other):
    rows = [with_logits(r, category=lambda logits: (5.0,) + (0.0,) * 6) for r in rows]
    policy, _ = fit_thresholds(rows, SafetyPolicy(), LABELS, target_fpr=target)
    outcomes = head_outcomes(rows, policy, LABELS)
    flagged = outcomes.highest_scores >= np.float32(other)
    clean = ~outcomes.risky
    if clean.any() and flagged[clean].mean() <= target:
        assert outcomes.flagged[~clean].sum() >= flagged[~clean].sum()


def rows_of_one_category(clean_scores, risky_scores):
    return [
        *(scored(s, images=(f"c{i}",)) for i, s in enumerate(clean_scores)),
        *(scored(s, 2, 0, images=(f"r{i}",)) for i, s in enumerate(risky_scores)),
    ]


def test_a_threshold_that_separates_already_is_kept():
    rows = rows_of_one_category(np.linspace(0.01, 0.2, 40), np.linspace(0.8, 0.99, 30))
    policy, _ = fit_thresholds(rows, SafetyPolicy(risk_threshold=0.6), LABELS, target_fpr=0.05)
    assert (policy.risk_threshold, policy.category_risk_thresholds) == (0.6, {"politics": 0.6})


def test_a_threshold_moves_down_only_as_far_as_it_catches_more():
    rows = rows_of_one_category(np.linspace(0.01, 0.2, 40), [0.3, 0.4, 0.9])
    policy, _ = fit_thresholds(rows, SafetyPolicy(), LABELS, target_fpr=0.05)
    assert policy.risk_threshold == pytest.approx(0.25)  # half-way between the last clean and the first risky row


@settings(deadline=None, max_examples=100)
@given(fit_halves(), st.sampled_from([0.1, 1.0, 5.0, 50.0]), st.floats(0, 1))
def test_no_single_threshold_costs_less_on_the_fit_half(rows, ratio, other):
    policy, _ = fit_thresholds(rows, SafetyPolicy(), LABELS, cost_ratio=ratio)
    outcomes = head_outcomes(rows, policy, LABELS)

    def cost(flagged):
        return (flagged & ~outcomes.risky).sum() + ratio * (~flagged & outcomes.risky).sum()

    assert cost(outcomes.flagged) <= cost(outcomes.highest_scores >= np.float32(other)) + 1e-9


def test_of_equally_cheap_thresholds_the_one_right_for_calibrated_scores_is_taken():
    rows = rows_of_one_category(np.linspace(0.01, 0.1, 30), np.linspace(0.8, 0.99, 30))
    policy, _ = fit_thresholds(rows, SafetyPolicy(), LABELS, cost_ratio=5)
    assert policy.risk_threshold == policy.category_risk_thresholds["politics"] == 1 / 6


def test_categories_with_too_few_rows_fall_back_and_are_named_with_counts():
    rows = rows_of_one_category(np.linspace(0.01, 0.4, 40), np.linspace(0.3, 0.99, 30))
    rows += [scored(0.9, verdict=4, images=(f"p{i}",)) for i in range(5)]
    notes = []
    policy, about = fit_thresholds(rows, SafetyPolicy(), LABELS, target_fpr=0.02, notes=notes)
    assert policy.category_risk_thresholds == {}  # 1 / 0.02 clean rows are needed
    assert about["categories"]["privacy"] == {"threshold": policy.risk_threshold, "own": False, "clean": 5, "risky": 0}
    assert "'politics' has too few rows for a threshold of its own (40 clean; 50 clean needed)" in notes[0]
    notes = []
    policy, _ = fit_thresholds(rows, SafetyPolicy(), LABELS, target_fpr=0.05, notes=notes)
    assert set(policy.category_risk_thresholds) == {"politics"}
    # The five rows of privacy may not use up what all clean rows may, after those of politics: 2 of 45.
    assert head_outcomes(rows, policy, LABELS).flagged[:40].sum() <= 2
    assert head_outcomes(rows, policy, LABELS).flagged[70:].sum() == 0


# -- halves ----------------------------------------------------------------------------------------------------------


def test_halves_share_no_image_have_both_classes_and_follow_the_seed():
    rows = random_records(200, rows_per_image=3)
    fit, report = split_by_image(rows, LABELS, seed=1)
    assert len(fit) + len(report) == 200 and abs(len(fit) - len(report)) < 40
    assert not {i for r in fit for i in r.images} & {i for r in report for i in r.images}
    for half in (fit, report):
        assert {r.level > 0 for r in half} == {True, False}
    assert split_by_image(rows, LABELS, seed=1) == (fit, report)
    assert split_by_image(rows, LABELS, seed=2) != (fit, report)


def test_the_policy_does_not_see_the_report_half():
    rows = random_records(300)
    result = calibrate(rows, "default", LABELS, target_fpr=0.1, num_resamples=0)
    reported = {r.row_id for r in result.report_half}
    # The same labels, so the same halves, but other scores where it is reported.
    changed = [with_logits(r, lambda logits: logits[::-1]) if r.row_id in reported else r for r in rows]
    again = calibrate(changed, "default", LABELS, target_fpr=0.1, num_resamples=0)
    assert {r.row_id for r in again.report_half} == reported
    assert again.policy == result.policy and again.report["after"] != result.report["after"]


def test_everything_but_temperatures_and_thresholds_stays():
    policy = SafetyPolicy(
        language="fr", level_actions={"none": "allow", "high": "warn"}, category_risk_thresholds={"privacy": 0.1}
    )
    result = calibrate(random_records(100), policy, LABELS, cost_ratio=5, num_resamples=10)
    fitted = ("name", "risk_threshold", "category_risk_thresholds", "level_temperature", "category_temperature")
    kept = {name: getattr(policy, name) for name in fitted}
    assert result.policy.replace(**kept) == policy and result.policy.name == "calibrated"
    assert list(result.report["operating_points"]) == ["default", "paper", "strict", "present", "calibrated"]
    json.dumps(result.report, allow_nan=False)


@pytest.mark.parametrize(
    "aim, message",
    [
        ({}, "Give one of `target_fpr` and `cost_ratio`, got None and None"),
        ({"target_fpr": 0.1, "cost_ratio": 5}, "Give one of"),
        ({"target_fpr": 1.0}, r"`target_fpr` must be in \[0, 1\), got 1.0"),
        ({"cost_ratio": 0}, "`cost_ratio` must be a number above 0, got 0"),
        ({"cost_ratio": float("nan")}, "above 0, got nan"),
    ],
)
def test_an_aim_out_of_range_is_refused(aim, message):
    with pytest.raises(ValueError, match=message):
        calibrate(random_records(20), "default", LABELS, **aim)


def test_a_policy_that_is_off_is_refused():
    with pytest.raises(ValueError, match="Policy 'off' is off"):
        calibrate(random_records(20), "off", LABELS, target_fpr=0.1)


@pytest.mark.parametrize("rows", [[scored(0.3, images=(f"{i}",)) for i in range(9)], random_records(9, 0, 1.0, 9)])
def test_rows_without_two_honest_halves_are_refused(rows):
    with pytest.raises(ValueError, match="needs risky and clean rows of several images.*[0-9]+ clean rows"):
        calibrate(rows, "default", LABELS, target_fpr=0.1)


# -- the model's own policy ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(model_folders, tmp_path):
    return Path(shutil.copytree(model_folders / "safe", tmp_path / "model"))


def test_a_stored_policy_changes_nothing_else_in_the_folder(model, processor, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    policy = SafetyPolicy(name="calibrated", risk_threshold=0.3, level_temperature=1.5)
    store_policy(folder, policy, copy.deepcopy(model), processor)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    old, new = (json.loads(files.pop("config.json")) for files in (before, after))
    assert after == before
    assert new.pop("safety_policy") == policy.to_dict() and old.pop("safety_policy") != policy.to_dict()
    assert new == old
    assert SafetyPolicy.from_value(SafeVlmConfig.from_pretrained(folder).safety_policy) == policy


def test_texts_that_the_model_does_not_know_are_stored_with_the_policy(model, processor, folder):
    policy = SafetyPolicy(refusals={"en": "The answer is no."})
    store_policy(folder, policy, copy.deepcopy(model), processor)
    loaded = SafeVlmForConditionalGeneration.from_pretrained(folder)
    assert "The answer is no." in loaded.config.policy_token_ids


def test_a_stored_policy_brings_what_opens_an_answer(tmp_path):
    """A reasoning model, saved by a release that did not record this: new refusals would land in its reasoning."""
    base, processor = build("qwen3_5")
    processor.chat_template = next(iter(THINKING.values()))
    processor = SafeVlmProcessor.from_base(processor)
    model = safe_model(base, processor)
    opening, model.config.answer_opening_token_ids = model.config.answer_opening_token_ids, []
    model.save_pretrained(tmp_path)
    store_policy(tmp_path, SafetyPolicy(refusals={"en": "The answer is no."}), model, processor)
    assert opening and SafeVlmConfig.from_pretrained(tmp_path).answer_opening_token_ids == opening


def test_an_interrupted_store_leaves_the_old_policy(model, processor, folder, monkeypatch):
    before = (folder / "config.json").read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        store_policy(folder, SafetyPolicy(risk_threshold=0.3), copy.deepcopy(model), processor)
    assert (folder / "config.json").read_bytes() == before


def test_a_hub_id_cannot_take_a_policy(model, processor):
    with pytest.raises(ValueError, match="'someone/model' is not a model folder"):
        store_policy("someone/model", SafetyPolicy(), copy.deepcopy(model), processor)
