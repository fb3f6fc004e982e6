"""The combined loss on numbers worked out by hand."""

import math

import pytest
import torch

from safevlm.safety_modules import combine_losses, safety_losses

# Two rows; softmax of (log 3, 0) is (3/4, 1/4), of (0, 0, log 2) it is (1/4, 1/4, 1/2).
LEVEL_LOGITS = [[math.log(3), 0.0], [0.0, math.log(3)]]
CATEGORY_LOGITS = [[0.0, 0.0, math.log(2)], [0.0, math.log(2), 0.0]]


def losses(level_labels, category_labels, assessed=(True, True)):
    level_logits = torch.tensor(LEVEL_LOGITS, requires_grad=True)
    category_logits = torch.tensor(CATEGORY_LOGITS, requires_grad=True)
    labels = [None if x is None else torch.tensor(x) for x in (level_labels, category_labels)]
    out = safety_losses(level_logits, category_logits, *labels, torch.tensor(assessed))
    return out, level_logits, category_logits


def test_losses_are_the_mean_cross_entropy_over_rows():
    out, *_ = losses([0, 0], [2, 0])
    # level: (-log 3/4 - log 1/4) / 2; category: (-log 1/2 - log 1/4) / 2
    assert out["safety_level_loss"].item() == pytest.approx((0.2876821 + 1.3862944) / 2, abs=1e-6)
    assert out["safety_category_loss"].item() == pytest.approx((0.6931472 + 1.3862944) / 2, abs=1e-6)


def test_rows_without_a_label_do_not_count_in_the_mean():
    out, *_ = losses([0, -100], [-100, 1])
    assert out["safety_level_loss"].item() == pytest.approx(0.2876821, abs=1e-6)
    assert out["safety_category_loss"].item() == pytest.approx(0.6931472, abs=1e-6)


def test_unassessed_rows_do_not_count_and_get_no_gradient():
    out, level_logits, category_logits = losses([0, 0], [2, 0], assessed=(True, False))
    assert out["safety_level_loss"].item() == pytest.approx(0.2876821, abs=1e-6)
    assert out["safety_category_loss"].item() == pytest.approx(0.6931472, abs=1e-6)
    (out["safety_level_loss"] + out["safety_category_loss"]).backward()
    # d(-log p_label)/d logits = p - one_hot(label), for the one row that counts
    assert torch.allclose(level_logits.grad, torch.tensor([[-0.25, 0.25], [0.0, 0.0]]))
    assert torch.allclose(category_logits.grad, torch.tensor([[0.25, 0.25, -0.5], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("labels, assessed", [([-100, -100], (True, True)), ([0, 1], (False, False))])
def test_no_labelled_row_gives_zero_loss_and_zero_gradient(labels, assessed):
    out, level_logits, category_logits = losses(labels, labels, assessed)
    total = out["safety_level_loss"] + out["safety_category_loss"]
    assert total.item() == 0
    total.backward()
    assert torch.equal(level_logits.grad, torch.zeros(2, 2))
    assert torch.equal(category_logits.grad, torch.zeros(2, 3))


def test_no_labels_passed_gives_no_loss():
    out, *_ = losses(None, [2, 0])
    assert out["safety_level_loss"] is None
    assert out["safety_category_loss"] is not None


def test_half_precision_logits_give_a_full_precision_loss():
    logits = torch.tensor([[10.0, 0.0]], dtype=torch.bfloat16)
    out = safety_losses(logits, logits, torch.tensor([1]), torch.tensor([1]), torch.tensor([True]))
    assert out["safety_level_loss"].dtype == torch.float32
    assert out["safety_level_loss"].item() == pytest.approx(10.0000454, abs=1e-5)


def test_combined_loss_is_lm_plus_weighted_safety_losses():
    parts = [torch.tensor(x) for x in (2.0, 0.5, 0.25)]
    assert combine_losses(*parts, level_coef=10, category_coef=4).item() == 2 + 5 + 1


@pytest.mark.parametrize("present, expected", [((1, 0, 0), 2.0), ((0, 1, 0), 5.0), ((0, 0, 1), 1.0), ((1, 0, 1), 3.0)])
def test_parts_that_are_missing_are_left_out(present, expected):
    parts = [torch.tensor(x) if there else None for x, there in zip((2.0, 0.5, 0.25), present, strict=True)]
    assert combine_losses(*parts, level_coef=10, category_coef=4).item() == expected


def test_no_part_at_all_is_no_loss():
    assert combine_losses(None, None, None, 10, 10) is None
