"""Gradient checkpointing, reentrant or not, changes no gradient: frozen base, LoRA, and rows without an image."""

import pytest
import torch

from safevlm.trainer.preparation import add_lora, set_trainable


@pytest.fixture
def gradients(make_trainer, arguments, fresh_model):
    """`gradients(rows, reentrant, **arguments)`: of one training step, by parameter name."""

    def compute(rows, reentrant, **changes):
        checkpointing = {}
        if reentrant is not None:
            checkpointing = dict(
                gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
        args = arguments(**changes)
        torch.manual_seed(0)
        model = fresh_model()
        if args.uses_lora:
            model = add_lora(model, args)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # 0 at first, which makes all other gradients of LoRA 0
                    torch.nn.init.normal_(parameter)
        else:
            set_trainable(model, args.trainable)
        found = {}

        class Recorder:
            def __call__(self, grad, name):
                found[name] = grad.clone()

        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda grad, name=name: Recorder()(grad, name))
        trainer = make_trainer(
            model,
            rows,
            max_steps=1,
            per_device_train_batch_size=len(rows),
            label_conditioning_end=1.0,
            hint_probability=0.0,
            **checkpointing,
            **changes,
        )
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
    if not images and stage == "stage 1":
        pytest.skip("Nothing trains on rows without an image in stage 1.")
    chosen = rows[:3] if images else [make_row(20, images=0), make_row(21, images=0, answer="yes")]
    expected = gradients(chosen, None, **STAGES[stage])
    assert any(name.endswith("lora_A.default.weight") for name in expected) == ("LoRA" in stage)
    assert any(".safety." in f".{name}" for name in expected) == images
    for reentrant in (False, True):
        found = gradients(chosen, reentrant, **STAGES[stage])
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023
