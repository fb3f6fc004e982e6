"""Gradient checkpointing, reentrant or not, changes no gradient: frozen base, LoRA, and rows without an image."""

import pytest
import torch


@pytest.fixture
def gradients(make_trainer, fresh_model):
    """`gradients(rows, reentrant, **arguments)`: of one training step, by parameter name."""

    def compute(rows, reentrant, **changes):
        checkpointing = {}
        if reentrant is not None:
            checkpointing = dict(
                gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
        model = fresh_model()
        trainer = make_trainer(
            model,
            rows,
            max_steps=1,
            per_device_train_batch_size=sum(bool(row.images) == bool(rows[0].images) for row in rows),
            label_conditioning_end=1.0,
            hint_probability=0.0,
            train_sampling_strategy="sequential",
            **checkpointing,
            **changes,
        )
        found = {}
        torch.manual_seed(0)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # 0 at first, which makes all other gradients of LoRA 0
                torch.nn.init.normal_(parameter)
            if parameter.requires_grad:
                parameter.register_hook(lambda grad, name=name: found.update({name: grad.clone()}))
        trainer.train()
        assert model.is_gradient_checkpointing == (reentrant is not None)
        return found

    return compute


STAGES = {
    "stage 1": dict(stage="safety_alignment"),
    "stage 2 in full": dict(stage="joint_finetuning"),
    "stage 2 with LoRA": dict(stage="joint_finetuning", lora_r=4, lora_dropout=0.0),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("images", [True, False], ids=["with images", "text only"])
def test_checkpointing_changes_no_gradient(gradients, rows, make_row, stage, images):
    # The head needs one row with a picture in the set; the step does not come to it.
    texts = [make_row(20, images=0), make_row(21, images=0, answer="yes")]
    chosen = rows[:3] if images else [*texts, rows[0]]
    expected = gradients(chosen, None, **STAGES[stage])
    assert any(name.endswith("lora_A.default.weight") for name in expected) == ("LoRA" in stage)
    safety = [gradient for name, gradient in expected.items() if ".safety." in f".{name}"]
    assert any(gradient.any() for gradient in safety) == images
    for reentrant in (False, True):
        found = gradients(chosen, reentrant, **STAGES[stage])
        assert found.keys() == expected.keys() or not images  # no gradient and one of 0 come to the same
        for name in expected:
            gradient = found.get(name, torch.zeros_like(expected[name]))
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023
