"""float32, bfloat16 and float16: loading, verdicts, generation and saving."""

import pytest
import torch
from tiny import SIZES

from safevlm import SafeVlmForConditionalGeneration

# On risk probabilities, from the precision of the significand: 8 and 11 bits.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request):
    return request.param


def dtypes(model) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


def test_half_precision_gives_the_verdicts_of_float32(model, batch, model_folders, dtype):
    found = SafeVlmForConditionalGeneration.from_pretrained(model_folders / "safe", dtype=dtype)
    assert dtypes(found) == {dtype}
    half, full = found.assess(**batch), model.assess(**batch)
    assert half.score.dtype == torch.float32  # probabilities are computed in full
    for name in ("level_probabilities", "category_probabilities", "score"):
        torch.testing.assert_close(getattr(half, name), getattr(full, name), rtol=0, atol=TOLERANCE[dtype])
    assert torch.equal(half.assessed, full.assessed)
    output = found(**batch)
    assert output.logits.dtype == dtype and output.logits.isfinite().all()
    assert found.generate(**batch).shape[0] == 3


def test_half_precision_is_kept_by_saving(batch, model_folders, dtype, tmp_path):
    found = SafeVlmForConditionalGeneration.from_pretrained(model_folders / "safe", dtype=dtype)
    found.save_pretrained(tmp_path)
    again = SafeVlmForConditionalGeneration.from_pretrained(tmp_path)
    assert dtypes(again) == {dtype}
    assert torch.equal(again.assess(**batch).score, found.assess(**batch).score)


def test_safety_modules_take_the_dtype_of_the_base_they_go_onto(model, batch, model_folders, dtype):
    fresh = SafeVlmForConditionalGeneration.from_base(model_folders / "base", base_kwargs={"dtype": dtype}, **SIZES)
    assert dtypes(fresh) == {dtype} and fresh.config.dtype in (dtype, str(dtype).removeprefix("torch."))
    adapted = SafeVlmForConditionalGeneration.from_base(
        model_folders / "base", safety_adapter=model_folders / "adapter", base_kwargs={"dtype": dtype}
    )
    assert dtypes(adapted) == {dtype}
    score = adapted.assess(**batch).score
    torch.testing.assert_close(score, model.assess(**batch).score, rtol=0, atol=TOLERANCE[dtype])


def test_safety_modules_in_float32_work_on_a_half_precision_base(model, batch, model_folders, dtype):
    """As in training, where they have float32 weights."""
    found = SafeVlmForConditionalGeneration.from_pretrained(model_folders / "safe", dtype=dtype)
    found.safety.float()
    torch.testing.assert_close(found.assess(**batch).score, model.assess(**batch).score, rtol=0, atol=TOLERANCE[dtype])
    assert found(**batch).logits.dtype == dtype
    found.generate(**batch)
