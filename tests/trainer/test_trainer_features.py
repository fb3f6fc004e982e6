"""What transformers' Trainer offers: it works with SafeVLM, or it is refused by name."""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations import integration_utils

from safevlm.trainer import SafeVlmTrainer
from safevlm.trainer.encoding.data_collator import SafeVlmDataCollator

LORA = dict(stage="joint_finetuning", lora_r=4)


@pytest.mark.parametrize(
    "name, value",
    [
        ("label_smoothing_factor", 0.1),
        ("use_liger_kernel", True),
        ("torch_compile", True),
        ("remove_unused_columns", True),
        ("label_names", ["labels"]),
        ("accelerator_config", {"dispatch_batches": True}),
        ("debug", "underflow_overflow"),
    ],
)
def test_arguments_that_cannot_work_are_refused_by_name(arguments, name, value):
    for other in ({}, {"average_tokens_across_devices": False}):
        with pytest.raises(ValueError, match=rf"`{name}.*` is not supported in SafeVLM's training"):
            arguments(**{name: value}, **other)


def test_options_that_cannot_work_are_refused_by_name(fresh_model, arguments, processor, rows):
    model = fresh_model()
    sgd = torch.optim.SGD(model.parameters())
    for changes, name, option in (
        ({}, "compute_loss_func", lambda *args, **kwargs: 0),
        ({}, "model_init", fresh_model),
        (LORA, "optimizers", (sgd, None)),
    ):
        with pytest.raises(ValueError, match=f"`{name}` is not supported"):
            SafeVlmTrainer(
                model=model,
                args=arguments(**changes),
                train_dataset=rows,
                processing_class=processor,
                **{name: option},
            )
    with pytest.raises(ValueError, match="`hub_strategy=checkpoint` is not supported with LoRA"):
        arguments(**LORA, push_to_hub=True, hub_strategy="checkpoint")
    args = arguments()
    args._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs in one process would separate rows from their images.*torchrun"):
        SafeVlmTrainer(model=model, args=args, train_dataset=rows, processing_class=processor)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_report_to_without_its_package_is_one_clear_error(arguments, name, monkeypatch):
    monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: False)
    with pytest.raises(
        ImportError, match=rf"`report_to` '{name}' needs a package that is not installed: pip install {name}\."
    ):
        arguments(report_to=name)


def test_an_unknown_report_to_lists_those_there_are(arguments):
    with pytest.raises(ValueError, match="`report_to` 'tensorbord' is unknown; use none, all, .*tensorboard.*wandb"):
        arguments(report_to=["tensorbord"])


def test_losses_are_reported_by_name(fresh_model, make_trainer, rows, monkeypatch):
    logged = {}
    writer = SimpleNamespace(
        add_text=lambda *a: None, add_hparams=lambda *a, **k: None, flush=lambda: None, close=lambda: None,
        add_scalar=lambda name, value, step: logged.setdefault(name, []).append((step, value)),
    )  # fmt: skip
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda **kwargs: writer))
    make_trainer(
        fresh_model(), rows, rows, report_to="tensorboard", logging_steps=1, eval_strategy="steps", eval_steps=2
    ).train()
    for name in ("lm_loss", "safety_level_loss", "safety_category_loss"):
        assert [step for step, _ in logged[f"train/{name}"]] == [1, 2]
        assert [step for step, _ in logged[f"eval/{name}"]] == [2]


def test_neftune_adds_its_noise_in_training_only(fresh_model, make_trainer, rows, weights, differing):
    plain, noisy = fresh_model(), fresh_model()
    for model, alpha in ((plain, None), (noisy, 5.0)):
        trainer = make_trainer(model, rows, neftune_noise_alpha=alpha, label_conditioning_end=1.0)
        trainer.train()
    assert differing(weights(plain), weights(noisy))
    assert trainer.evaluate(rows)["eval_loss"] == trainer.evaluate(rows)["eval_loss"]
    assert len(noisy.get_input_embeddings()._forward_hooks) == len(plain.get_input_embeddings()._forward_hooks)


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance", "sequential"])
def test_every_way_to_draw_rows_trains(fresh_model, make_trainer, rows, strategy):
    trainer = make_trainer(fresh_model(), rows, train_sampling_strategy=strategy)
    trainer.train()
    assert trainer.state.global_step == 2


def test_metrics_get_inputs_and_losses_where_asked(fresh_model, make_trainer, rows):
    seen = {}

    def metrics(prediction):
        seen.update(inputs=prediction.inputs.shape, losses=prediction.losses.shape)
        return {}

    make_trainer(
        fresh_model(), compute_metrics=metrics, include_for_metrics=["inputs", "loss"], per_device_eval_batch_size=3
    ).evaluate(rows)
    assert seen["inputs"][0] == 8 and seen["losses"][0] >= 8


def test_metrics_may_be_computed_batch_by_batch(fresh_model, make_trainer, rows):
    batches = []

    def metrics(prediction, compute_result):
        batches.append(len(prediction.predictions[0]))
        return {"batches": len(batches)} if compute_result else {}

    trainer = make_trainer(
        fresh_model(), compute_metrics=metrics, batch_eval_metrics=True, per_device_eval_batch_size=3
    )
    assert trainer.evaluate(rows)["eval_batches"] == 3 and batches == [3, 3, 2]


def test_losses_alone_may_be_asked_for(fresh_model, make_trainer, rows):
    trainer = make_trainer(fresh_model(), prediction_loss_only=True)
    output = trainer.predict(rows)
    assert output.predictions is None and output.metrics["test_safety_level_loss"] > 0


def test_an_optimizer_of_one_s_own_trains_what_the_stage_trains(
    fresh_model, arguments, processor, rows, weights, differing
):
    model = fresh_model()
    before = weights(model)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(sgd, factor=1.0)
    SafeVlmTrainer(
        model=model, args=arguments(), train_dataset=rows, processing_class=processor, optimizers=(sgd, schedule)
    ).train()
    changed = differing(before, weights(model))
    assert changed and all(name.startswith("safety.") for name in changed)


def test_an_optimizer_class_of_one_s_own_trains_lora(fresh_model, arguments, processor, rows, weights, differing):
    model = fresh_model()
    before = weights(model)
    SafeVlmTrainer(
        model=model,
        args=arguments(**LORA),
        train_dataset=rows,
        processing_class=processor,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}),
    ).train()
    assert any(name.startswith("base.") for name in differing(before, weights(model)))


def test_a_batch_that_does_not_fit_is_made_smaller(fresh_model, arguments, processor, rows):
    sizes = []

    def collate(encoded):
        sizes.append(len(encoded))
        if len(encoded) > 4:
            raise RuntimeError("CUDA out of memory.")
        return SafeVlmDataCollator(processor.tokenizer.pad_token_id)(encoded)

    args = arguments(auto_find_batch_size=True, per_device_train_batch_size=8)
    trainer = SafeVlmTrainer(
        model=fresh_model(), args=args, data_collator=collate, train_dataset=rows, processing_class=processor
    )
    trainer.train()
    assert trainer.state.global_step == 2 and sizes[0] == 8 and sizes[-1] <= 4


@pytest.mark.parametrize(
    "changes", [{"average_tokens_across_devices": False}, {"bf16": True}, {"dataloader_num_workers": 1}]
)
def test_other_arguments_train_and_evaluate(fresh_model, make_trainer, rows, changes):
    trainer = make_trainer(fresh_model(), rows, rows, logging_steps=1, **changes)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "lm_loss" in log]
    assert len(logs) == 2 and all(log["lm_loss"] > 0 and log["safety_level_loss"] > 0 for log in logs)
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_lm_loss", "eval_safety_level_loss", "eval_safety_category_loss"} <= set(metrics)
