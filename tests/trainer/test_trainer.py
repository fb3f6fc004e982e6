"""SafeVlmTrainer: the combined loss under gradient accumulation, conditioning, logs and predictions."""

import pytest
import torch
from transformers import TrainerCallback

from safevlm import SafetyPolicy, SafeVlmProcessor
from safevlm.trainer import SafeVlmTrainingArguments
from safevlm.trainer.encoding.data_collator import SafeVlmDataCollator
from safevlm.trainer.encoding.encoded_datasets import EncodedDataset
from safevlm.trainer.encoding.row_encoder import RowEncoder
from safevlm.trainer.evaluation import trainer_metrics
from safevlm.trainer.stage.label_conditioning import draw_rows


class KeepGradients(TrainerCallback):
    """The gradients of the first optimisation step."""

    def __init__(self):
        self.gradients = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradients is None:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def gradients(fresh_model, make_trainer):
    """`gradients(rows, batch_size, accumulation)`: of the first step of a training, unclipped."""

    def train(rows, batch_size, accumulation, **changes):
        keep = KeepGradients()
        trainer = make_trainer(
            fresh_model(),
            rows,
            callbacks=[keep],
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0,
            hint_probability=0,
            **changes,
        )
        trainer.train()
        return keep.gradients, trainer

    return train


@pytest.fixture
def reference(fresh_model, processor):
    """`reference(rows)`: gradients of the model's own loss on all rows as one batch, and the losses."""

    def backward(rows):
        model = fresh_model().train()
        dataset = EncodedDataset(rows, RowEncoder(processor, model.config))
        batch = SafeVlmDataCollator(0)([dataset[i] for i in range(len(rows))])
        output = model(**batch, condition_on_labels=torch.ones(len(rows), dtype=torch.bool))
        output.loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, output

    return backward


@pytest.fixture(scope="module")
def equal_rows(make_row):
    return [make_row(i, answer="no", category=i, level=i % 4) for i in range(4)]


@pytest.fixture(scope="module")
def unequal_rows(make_row):
    """1 to 40 answer tokens a row: the mean over tokens differs much from the mean over rows."""
    answers = ["no", "The answer is yes. " * 3, "yes", "What is in the picture? ASSISTANT"]
    return [make_row(i, answer=answer, category=i, level=i % 4) for i, answer in enumerate(answers)]


@pytest.fixture(scope="module")
def partly_labelled_rows(make_row):
    """Micro-batches of one or two of them have no safety loss, or one over fewer rows than others."""
    return [
        make_row(0, category=None, level=None),
        make_row(1, images=0),
        make_row(2, category=1, level=3),
        make_row(3, category=6, level=None),
    ]


# Which loss alone reaches which weights.
ONLY_FROM = {
    "lm_loss": "safety.embeddings.tokens.weight",
    "safety_level_loss": "safety.head.level_classifier.weight",
    "safety_category_loss": "safety.head.category_classifier.weight",
}


@pytest.mark.parametrize("batch_size, accumulation", [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("kind", ["equal_rows", "unequal_rows", "partly_labelled_rows"])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    request, gradients, reference, batch_size, accumulation, kind
):
    rows = request.getfixturevalue(kind)
    found, _ = gradients(rows, batch_size, accumulation, train_sampling_strategy="sequential")
    expected, _ = reference(rows)
    for loss, name in ONLY_FROM.items():
        scale = expected[name].abs().max()
        assert scale > 0, name
        assert torch.allclose(found[name], expected[name], atol=2e-5 * scale.item()), loss
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-4), name


def test_a_shorter_accumulation_at_the_end_of_an_epoch_counts_in_full(gradients, equal_rows):
    found, _ = gradients(equal_rows[:3], 1, 4)  # only 3 micro-batches are there
    whole, _ = gradients(equal_rows[:3], 3, 1)
    for name in ONLY_FROM.values():
        assert torch.allclose(found[name], whole[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("batch_size, accumulation", [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("kind", ["unequal_rows", "partly_labelled_rows"])
def test_each_loss_is_logged_by_name_whatever_the_accumulation(
    request, gradients, reference, batch_size, accumulation, kind
):
    rows = request.getfixturevalue(kind)
    _, trainer = gradients(rows, batch_size, accumulation, logging_steps=1, train_sampling_strategy="sequential")
    _, output = reference(rows)
    log = trainer.state.log_history[0]
    for name in ("loss", *ONLY_FROM):
        assert log[name] == pytest.approx(output[name].item(), rel=1e-4), name
    coefs = trainer.model.config.safety_level_loss_coef, trainer.model.config.safety_category_loss_coef
    assert coefs == (10, 10)
    total = log["lm_loss"] + 10 * log["safety_level_loss"] + 10 * log["safety_category_loss"]
    assert log["loss"] == pytest.approx(total, rel=1e-4)


def test_logged_losses_are_those_since_the_last_log(fresh_model, make_trainer, equal_rows):
    trainer = make_trainer(fresh_model(), equal_rows, max_steps=4, logging_steps=2, per_device_train_batch_size=4)
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert second["lm_loss"] < first["lm_loss"]
    for log in (first, second):
        total = log["lm_loss"] + 10 * log["safety_level_loss"] + 10 * log["safety_category_loss"]
        assert log["loss"] == pytest.approx(total, rel=1e-3)


def test_a_loss_without_a_labelled_row_is_not_logged(fresh_model, make_trainer, make_row):
    rows = [make_row(0), make_row(1, category=None, level=None)]
    settings = dict(per_device_train_batch_size=1, train_sampling_strategy="sequential", logging_steps=1)
    trainer = make_trainer(fresh_model(), rows, **settings)
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["safety_level_loss"] > 0 and "safety_level_loss" not in second
    assert second["loss"] == pytest.approx(second["lm_loss"], rel=1e-4)


def test_loss_coefficients_of_the_arguments_override_the_model_s(fresh_model, make_trainer, equal_rows):
    model = fresh_model()
    trainer = make_trainer(model, equal_rows, max_steps=1, logging_steps=1, safety_level_loss_coef=0.5)
    trainer.train()
    log = trainer.state.log_history[0]
    assert (model.config.safety_level_loss_coef, model.config.safety_category_loss_coef) == (0.5, 10.0)
    total = log["lm_loss"] + 0.5 * log["safety_level_loss"] + 10 * log["safety_category_loss"]
    assert log["loss"] == pytest.approx(total, rel=1e-4)


def test_evaluation_logs_every_loss_and_the_metrics(fresh_model, make_trainer, rows):
    trainer = make_trainer(
        fresh_model(), eval_dataset=rows, compute_metrics=trainer_metrics, per_device_eval_batch_size=3
    )
    metrics = trainer.evaluate()
    log = trainer.state.log_history[-1]
    assert {"eval_loss", "eval_lm_loss", "eval_safety_level_loss", "eval_safety_category_loss"} <= set(log)
    assert {"eval_loss", "eval_level_accuracy", "eval_category_macro_f1", "eval_auroc"} <= set(metrics)
    assert metrics["eval_num_assessed"] == 6  # eight rows: one without labels, one without an image


def test_predictions_are_the_head_s_logits(fresh_model, make_trainer, processor, rows):
    model = fresh_model()
    trainer = make_trainer(model, eval_dataset=rows, per_device_eval_batch_size=3)
    output = trainer.predict(trainer.eval_dataset)
    levels, categories, assessed = output.predictions
    assert assessed.tolist() == [True] * 4 + [False] + [True] * 3
    assert levels.shape == (8, 4) and categories.shape == (8, 7)
    labels, level_labels, category_labels = output.label_ids
    assert level_labels.tolist() == [1, 0, 2, -100, 0, 3, 0, 2]
    assert category_labels.tolist() == [0, 6, 1, -100, 6, 4, 6, 2]
    expected = model(**SafeVlmDataCollator(0)([trainer.eval_dataset[2]])).safety_level_logits[0]
    assert torch.allclose(torch.tensor(levels[2]), expected, atol=1e-5)


def test_rows_without_an_image_are_unassessed_even_in_batches_of_their_own(fresh_model, make_trainer, make_row):
    rows = [make_row(0, images=0), make_row(1, images=0), make_row(2), make_row(3, images=0)]
    trainer = make_trainer(fresh_model(), eval_dataset=rows, per_device_eval_batch_size=2)
    assert trainer.predict(trainer.eval_dataset).predictions[2].tolist() == [False, False, True, False]


def test_evaluation_rows_carry_no_hints(fresh_model, make_trainer, rows, processor):
    trainer = make_trainer(fresh_model(), train_dataset=rows, eval_dataset=rows, hint_probability=1.0)
    texts = [
        [processor.tokenizer.decode(row["input_ids"]) for row in dataset]
        for dataset in ([d[i] for i in range(8)] for d in (trainer.train_dataset, trainer.eval_dataset))
    ]
    assert [sum("Note: this" in text for text in part) for part in texts] == [4, 0]


def test_label_conditioning_goes_linearly_from_start_to_end(fresh_model, make_trainer, equal_rows, monkeypatch):
    model = fresh_model()
    seen, shares = [], []
    model.register_forward_pre_hook(
        lambda m, a, kwargs: seen.append(kwargs.get("condition_on_labels")), with_kwargs=True
    )

    def keep_share(inputs, share):
        shares.append(share)
        return draw_rows(inputs, share)

    monkeypatch.setattr("safevlm.trainer.stage.trainer.draw_rows", keep_share)
    trainer = make_trainer(
        model,
        equal_rows,
        eval_dataset=equal_rows,
        max_steps=4,
        gradient_accumulation_steps=2,
        label_conditioning_start=0.9,
        label_conditioning_end=0.1,
    )
    trainer.train()
    assert shares == pytest.approx([0.9, 0.9, 0.7, 0.7, 0.5, 0.5, 0.3, 0.3])
    assert len(seen) == 8 and all(mask.dtype == torch.bool for mask in seen)
    seen.clear()
    trainer.evaluate()
    assert set(seen) == {None}


def conditions(model, batch, monkeypatch, *on_labels):
    """Actions and categories that the batch's safety embeddings are conditioned on."""
    kept = {}
    condition = model.condition

    def keep(features, action, category):
        kept.update(action=action.tolist(), category=category.tolist())
        return condition(features, action, category)

    monkeypatch.setattr(model, "condition", keep)
    with torch.no_grad():
        model(**batch, condition_on_labels=torch.tensor(on_labels))
    return kept


def test_conditioning_is_on_labels_or_on_predictions(fresh_model, processor, verdicts, monkeypatch, make_row):
    model = fresh_model()
    rows = [make_row(0, category=1, level=3), make_row(1, category=2, level=1), make_row(2, category=None, level=None)]
    dataset = EncodedDataset(rows, RowEncoder(processor, model.config))
    batch = SafeVlmDataCollator(0)([dataset[i] for i in range(3)])
    verdicts(model, "none", "medium", "low", category="privacy")
    # default policy: low -> caution (1), medium -> warn (2), high -> refuse (3); row 2 has no label to use
    assert conditions(model, batch, monkeypatch, True, True, True) == {"action": [3, 1, 1], "category": [1, 2, 4]}
    assert conditions(model, batch, monkeypatch, False, False, False) == {"action": [0, 2, 1], "category": [6, 4, 4]}


def test_label_conditioning_is_the_share_of_rows():
    n = 1000
    labels = torch.full((n,), 3)
    inputs = {
        "input_ids": torch.zeros(n, 1),
        "safety_level_labels": labels,
        "safety_category_labels": labels,
        "pixel_values": torch.zeros(n, 1),
    }
    torch.manual_seed(0)
    assert 0.25 < draw_rows(inputs, 0.3).float().mean() < 0.35
    assert draw_rows(inputs, 1.0).all()
    for absent in ("safety_level_labels", "safety_category_labels", "pixel_values"):
        assert draw_rows({**inputs, absent: None}, 1.0) is None


def test_each_row_is_conditioned_on_its_labels_or_its_verdict(fresh_model, processor, verdicts, monkeypatch, make_row):
    model = fresh_model()
    rows = [make_row(i, category=1, level=3) for i in range(2)]
    dataset = EncodedDataset(rows, RowEncoder(processor, model.config))
    batch = SafeVlmDataCollator(0)([dataset[i] for i in range(2)])
    verdicts(model, "none", "none")
    assert conditions(model, batch, monkeypatch, True, False) == {"action": [3, 0], "category": [1, 6]}


def test_a_model_with_its_policy_off_is_trained_with_the_default_one(fresh_model, processor, monkeypatch, make_row):
    model = fresh_model(safety_policy=SafetyPolicy(name="off", enabled=False))
    dataset = EncodedDataset([make_row(0, category=1, level=3)], RowEncoder(processor, model.config))
    assert conditions(model, SafeVlmDataCollator(0)([dataset[0]]), monkeypatch, True)["action"] == [3]


def test_gradient_checkpointing_leaves_the_gradients_as_they_are(gradients, unequal_rows):
    plain, _ = gradients(unequal_rows, 2, 2)
    checkpointed, trainer = gradients(unequal_rows, 2, 2, gradient_checkpointing=True)
    assert trainer.model.base.is_gradient_checkpointing
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        assert torch.allclose(plain[name], checkpointed[name], rtol=1e-3, atol=1e-5), name


def test_a_processor_for_another_model_is_refused(fresh_model, make_trainer, base_processor, arguments):
    from safevlm.trainer import SafeVlmTrainer

    other = SafeVlmProcessor.from_base(base_processor, tokens_per_image=3)
    with pytest.raises(ValueError, match=r"tokens_per_image=8`, got 3"):
        SafeVlmTrainer(fresh_model(), arguments(), processing_class=other)
    with pytest.raises(ValueError, match=r"tokens_per_image=8`, got None"):
        SafeVlmTrainer(fresh_model(), arguments())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stage": "third"}, "`stage` must be one of 'safety_alignment', 'joint_finetuning', got 'third'"),
        ({"lora_r": -1}, "`lora_r` must be a number >= 0, got -1"),
        ({"safety_level_loss_coef": -1.0}, "`safety_level_loss_coef` must be a number >= 0, got -1.0"),
        ({"safety_category_loss_coef": float("nan")}, "`safety_category_loss_coef` must be a number >= 0, got nan"),
        ({"hint_probability": 1.5}, r"`hint_probability` must be in \[0, 1\], got 1.5"),
        ({"label_conditioning_end": -1}, r"`label_conditioning_end` must be in \[0, 1\], got -1"),
        (
            {
                "stage": "joint_finetuning",
                "lora_r": 4,
                "trainable": ["language_model", "base.model.multi_modal_projector"],
            },
            "With `lora_r=4`, `trainable` can hold 'safety' and 'language_model' only",
        ),
    ],
)
def test_bad_training_arguments_say_name_value_and_choice(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        SafeVlmTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **changes)
