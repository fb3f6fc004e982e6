"""Invariant 1: with the policy off, or without safety tokens, the model is its base, bit for bit."""

import pytest
import torch
from tiny import encode, new_tokens, safe_model, tiny_llava, tiny_processor

from safevlm import SafeVlmProcessor

QUESTIONS, IMAGES = ["What is in the picture?", "Is it yes?", "no"], [1, 2, 0]
STRATEGIES = {
    "greedy": {},
    "beams": dict(num_beams=3),
    "sampled": dict(do_sample=True, temperature=1.3),
    "sampled_beams": dict(do_sample=True, num_beams=3, num_return_sequences=2),
    "several_samples": dict(do_sample=True, num_return_sequences=3),
    "penalised": dict(repetition_penalty=1.5, no_repeat_ngram_size=2),
}


@pytest.fixture(scope="module")
def base_batch(base_processor):
    return encode(base_processor, QUESTIONS, IMAGES)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_policy_off_generates_what_the_base_generates(model, batch, base, base_batch, strategy):
    torch.manual_seed(0)
    expected = base.generate(**base_batch, **STRATEGIES[strategy], max_new_tokens=12)
    torch.manual_seed(0)
    answer = model.generate(**batch, safety_policy="off", **STRATEGIES[strategy], max_new_tokens=12)
    assert torch.equal(new_tokens(answer, batch), new_tokens(expected, base_batch))


@pytest.mark.parametrize("images", [0, 1, 2])
def test_policy_off_equals_the_base_for_single_rows_scores_included(model, processor, base, base_processor, images):
    settings = dict(return_dict_in_generate=True, output_scores=True)
    answer = model.generate(**encode(processor, ["hello"], [images]), safety_policy="off", **settings)
    expected = base.generate(**encode(base_processor, ["hello"], [images]), **settings)
    assert torch.equal(torch.stack(answer.scores), torch.stack(expected.scores))


@pytest.mark.parametrize("settings", [{}, dict(num_beams=2, num_return_sequences=2)])
def test_the_verdict_under_off_reads_like_any_other(model, batch, settings):
    output = model.generate(**batch, safety_policy="off", return_dict_in_generate=True, **settings)
    verdict = output.safety
    assert verdict is output["safety"] and len(verdict) == 3
    assert verdict.actions == ["off"] * 3 and not verdict.assessed.any() and not verdict.failed.any()
    assert verdict[1:].actions == ["off"] * 2
    guarded = model.generate(**batch, return_dict_in_generate=True).safety
    assert vars(verdict).keys() == vars(guarded).keys()
    for name, value in vars(verdict).items():
        if isinstance(value, torch.Tensor):
            assert (value.shape, value.dtype) == (getattr(guarded, name).shape, getattr(guarded, name).dtype)
    for row, other in zip(verdict.to_list(), guarded.to_list(), strict=True):
        assert row.keys() == other.keys()
        assert row == {**dict.fromkeys(other), "assessed": False, "action": "off"}
    assert "off (not assessed)" in repr(verdict)


@pytest.mark.parametrize("policy", ["off", "default", "paper"])
@pytest.mark.parametrize("settings", [{}, dict(num_beams=2, num_return_sequences=2)])
def test_returned_ids_start_with_the_callers_input_ids(model, batch, verdicts, policy, settings):
    verdicts(model, "low", "high", "none")
    answer = model.generate(**batch, safety_policy=policy, **settings)
    prompt = batch["input_ids"].repeat_interleave(len(answer) // len(batch["input_ids"]), dim=0)
    assert torch.equal(answer[:, : prompt.shape[1]], prompt)


def test_a_model_without_safety_tokens_has_the_bases_logits(base, base_processor, base_batch):
    processor = SafeVlmProcessor.from_base(tiny_processor(), tokens_per_image=0)
    model = safe_model(tiny_llava(), processor, num_prompt_tokens=0, num_projected_tokens=0)
    inputs = encode(processor, QUESTIONS, IMAGES)
    assert torch.equal(inputs["input_ids"], base_batch["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base(**base_batch).logits)
    assert torch.equal(model.generate(**inputs, safety_policy="off"), base.generate(**base_batch))


def test_wrapping_leaves_every_base_weight_bitwise_unchanged(model, base):
    expected = base.state_dict()
    assert model.base.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.base.state_dict().items())


def test_a_full_embedding_table_grows_and_greedy_answers_stay(processor, base_processor, base_batch, batch):
    """Without a spare row for `<safety>` the table must grow, which shows only in the width of the logits."""
    rows = len(base_processor.tokenizer)
    model = safe_model(tiny_llava(vocab_size=rows), processor)
    assert model.get_input_embeddings().weight.shape[0] > rows
    expected = tiny_llava(vocab_size=rows).generate(**base_batch)
    answer = model.generate(**batch, safety_policy="off")
    assert torch.equal(new_tokens(answer, batch), new_tokens(expected, base_batch))
    model.generate(**batch)  # placeholders also work in the new rows


def test_detaching_gives_the_plain_base_back(model, base, base_batch, tmp_path):
    model.base.save_pretrained(tmp_path)
    detached = type(base).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(detached(**base_batch).logits, base(**base_batch).logits)


def test_conditioning_does_change_the_answer(model, batch, base, base_batch, verdicts):
    """Makes the tests above meaningful: with the policy on, the tiny model's answer differs."""
    verdicts(model, "none", "none", "none")
    assert not torch.equal(
        new_tokens(model.generate(**batch), batch), new_tokens(base.generate(**base_batch), base_batch)
    )
