"""What the trainer takes as data: rows as people write them, in any kind of data set; and what it finds out first."""

import copy

import datasets
import pytest
import torch
from tiny import chat, picture

from safevlm.trainer.data import DataError, SafetyRow
from safevlm.trainer.encoding.encoded_datasets import EncodedDataset
from safevlm.trainer.encoding.row_checks import LengthEstimate
from safevlm.trainer.encoding.row_encoder import RowEncoder
from safevlm.trainer.evaluation import trainer_metrics

QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it yes?"}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "no"}]}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Four rows as people write them: paths and PIL images, string contents, labels by index and by name."""
    path = tmp_path_factory.mktemp("pictures") / "0.png"
    picture(0).save(path)
    text = {"role": "assistant", "content": "no"}
    return [
        {"messages": [QUESTION, ANSWER], "images": [str(path)], "safe_type": 1, "safe_level": 3},
        {"messages": [QUESTION, text], "images": [picture(10)], "category": "privacy", "level": "high"},
        {"messages": [QUESTION, ANSWER], "images": [picture(20)], "category": 6, "level": 0},
        {"messages": [{"role": "user", "content": "Is it?"}, text], "images": [], "category": "safe", "level": "none"},
    ]


@pytest.fixture(scope="module")
def examples(records):
    """The same rows as `SafetyRow`s."""
    labels = [(1, 3), (4, 3), (6, 0), (6, 0)]
    pictures = [[picture(0)], [picture(10)], [picture(20)], []]
    questions = [chat("Is it yes?")] * 3 + [chat("Is it?", 0)]
    return [
        SafetyRow(str(i), images, [*question, ANSWER], *label)
        for i, (images, question, label) in enumerate(zip(pictures, questions, labels, strict=True))
    ]


class TorchRows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class TorchStream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def columns(records):
    """`records` as `datasets` wants them: one type per column."""
    rows = []
    for record in records:
        turns = [
            {
                "role": turn["role"],
                "content": turn["content"]
                if isinstance(turn["content"], list)
                else [{"type": "text", "text": turn["content"]}],
            }
            for turn in record["messages"]
        ]
        rows.append({"messages": turns, "images": record["images"]})
    for row, (category, level) in zip(rows, [(1, 3), (4, 3), (6, 0), (6, 0)], strict=True):
        row.update(safe_type=category, safe_level=level)
    dataset = datasets.Dataset.from_list([{**row, "images": []} for row in rows])
    pictures = [
        [{"bytes": None, "path": image} if isinstance(image, str) else image for image in row["images"]]
        for row in rows
    ]
    feature = datasets.List(datasets.Image())
    encoded = [[datasets.Image().encode_example(image) for image in images] for images in pictures]
    return dataset.remove_columns("images").add_column("images", encoded, feature=feature)


KINDS = {
    "list": list,
    "tuple": tuple,
    "datasets": columns,
    "torch": TorchRows,
    "torch stream": TorchStream,
    "datasets of tensors": lambda records: columns(records).with_format("torch"),
    "datasets of arrays": lambda records: columns(records).with_format("numpy"),
    "datasets stream": lambda records: columns(records).to_iterable_dataset(),
}


@pytest.fixture(scope="module")
def cache():
    return {}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_set_trains_and_evaluates_to_the_same(
    fresh_model, make_trainer, records, examples, weights, differing, cache, kind
):
    def train(rows):
        settings = dict(max_steps=2, train_sampling_strategy="sequential", per_device_eval_batch_size=2)
        trainer = make_trainer(fresh_model(), rows, **settings)
        trainer.train()
        return trainer, weights(trainer.model), trainer.evaluate(rows)["eval_loss"]

    if not cache:
        cache["expected"] = train(examples)[1:]
    data = KINDS[kind](records)
    trainer, *found = train(data)
    assert not differing(found[0], cache["expected"][0])
    assert found[1] == pytest.approx(cache["expected"][1])
    output = trainer.predict(data)
    assert output.predictions[0].shape == (4, 4) and output.label_ids[2].tolist() == [1, 4, 6, 6]
    assert output.predictions[2].tolist() == [True, True, True, False]
    assert {"test_loss", "test_lm_loss", "test_safety_level_loss"} <= set(output.metrics)


def test_names_of_the_model_s_own_taxonomy_are_read(fresh_model, make_trainer, records):
    model = fresh_model(
        category_names=["weapons", "fine"],
        safe_category="fine",
        level_names=["no", "yes"],
        safety_policy={"name": "mine", "level_actions": {"no": "allow", "yes": "refuse"}},
    )
    rows = [{**records[0], "category": "weapons", "level": "yes"}, {**records[2], "category": 1, "level": "no"}]
    rows = [{k: v for k, v in row.items() if not k.startswith("safe_")} for row in rows]
    trainer = make_trainer(model, rows)
    trainer.train()
    assert trainer.predict(rows).label_ids[1].tolist() == [1, 0]


def test_several_evaluation_sets_are_told_apart(fresh_model, make_trainer, records, examples):
    trainer = make_trainer(fresh_model(), eval_dataset={"first": records[:2], "all": examples})
    metrics = trainer.evaluate()
    names = ("loss", "lm_loss", "safety_level_loss", "safety_category_loss")
    assert {f"eval_{part}_{name}" for part in ("first", "all") for name in names} <= set(metrics)
    alone = make_trainer(fresh_model()).evaluate(records[:2])
    assert metrics["eval_first_lm_loss"] == pytest.approx(alone["eval_lm_loss"])


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_evaluation_losses_are_means_over_tokens_and_rows(fresh_model, make_trainer, make_row, batch_size):
    rows = [
        make_row(0, answer="The answer is yes. " * 3),
        make_row(1, category=None, level=None),
        make_row(2, images=0),
    ]
    rows += [make_row(3, category=6, level=0)]
    found = make_trainer(fresh_model(), per_device_eval_batch_size=batch_size).evaluate(rows)
    whole = make_trainer(fresh_model(), per_device_eval_batch_size=len(rows)).evaluate(rows)
    for name in ("loss", "lm_loss", "safety_level_loss", "safety_category_loss"):
        assert found[f"eval_{name}"] == pytest.approx(whole[f"eval_{name}"], rel=1e-5)


def test_batches_may_stay_apart(fresh_model, make_trainer, examples):
    settings = dict(compute_metrics=trainer_metrics, per_device_eval_batch_size=3)
    together = make_trainer(fresh_model(), **settings).evaluate(examples)
    apart = make_trainer(fresh_model(), eval_do_concat_batches=False, **settings).evaluate(examples)
    for name in ("eval_level_accuracy", "eval_category_macro_f1", "eval_num_assessed"):
        assert apart[name] == together[name]


def test_a_collator_and_metrics_of_one_s_own_are_used(fresh_model, arguments, processor, examples):
    from safevlm.trainer import SafeVlmTrainer
    from safevlm.trainer.encoding.data_collator import SafeVlmDataCollator

    seen = []

    def collate(rows):
        seen.extend(row.row_id for row in rows)
        return SafeVlmDataCollator(processor.tokenizer.pad_token_id)(rows)

    trainer = SafeVlmTrainer(
        model=fresh_model(),
        args=arguments(),
        data_collator=collate,
        train_dataset=examples,
        processing_class=processor,
        compute_metrics=lambda prediction: {"rows": len(prediction.predictions[0])},
    )
    trainer.train()
    assert trainer.evaluate(examples)["eval_rows"] == 4
    assert set(seen) == {"0", "1", "2", "3"}


# -- rows without an answer, without a picture


def test_rows_without_an_answer_train_the_head_alone(fresh_model, make_trainer, records, weights, differing):
    rows = [{**record, "messages": record["messages"][:1]} for record in records[:3]]
    model = fresh_model()
    before = weights(model)
    trainer = make_trainer(model, rows, logging_steps=1, **{"stage": "joint_finetuning"}, label_conditioning_end=1.0)
    trainer.train()
    changed = differing(before, weights(model))
    assert "safety.head.level_classifier.weight" in changed
    changed.discard("base.model.language_model.embed_tokens.weight")  # which the head reads
    assert not [name for name in changed if name.startswith(("base.", "safety.embeddings."))]
    assert not [log for log in trainer.state.log_history if "lm_loss" in log]
    metrics = trainer.evaluate(rows)
    assert "eval_lm_loss" not in metrics and metrics["eval_safety_level_loss"] > 0


def test_rows_without_an_answer_in_a_step_leave_the_others_loss_as_it_is(fresh_model, make_trainer, make_row):
    """Their micro-batch has no token to divide by."""

    def gradients(rows):
        model = fresh_model()
        settings = dict(per_device_train_batch_size=1, gradient_accumulation_steps=len(rows), max_steps=1)
        trainer = make_trainer(
            model,
            rows,
            max_grad_norm=0,
            hint_probability=0,
            learning_rate=1.0,
            optim="sgd",
            train_sampling_strategy="sequential",
            lr_scheduler_type="constant",
            **settings,
        )
        before = model.safety.embeddings.tokens.weight.detach().clone()
        trainer.train()
        return before - model.safety.embeddings.tokens.weight.detach()

    answered = make_row(0)
    question = SafetyRow("q", [picture(3)], chat("Is it?"), 6, 0)
    alone, mixed = gradients([answered]), gradients([question, answered])
    assert alone.abs().max() > 0
    assert torch.allclose(alone, mixed, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("batch_size, accumulation", [(1, 2), (2, 1)])
def test_micro_batches_without_a_picture_train_in_stage_1(
    fresh_model, make_trainer, make_row, weights, differing, batch_size, accumulation
):
    rows = [make_row(0, images=0), make_row(1, images=0), make_row(2), make_row(3)]
    model = fresh_model()
    before = weights(model)
    make_trainer(
        model,
        rows,
        max_steps=2,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
    ).train()
    changed = differing(before, weights(model))
    assert changed and all(name.startswith("safety.") for name in changed)


# -- found before training


@pytest.fixture
def never_trained(monkeypatch):
    from safevlm.trainer import SafeVlmTrainer

    monkeypatch.setattr(SafeVlmTrainer, "training_step", lambda *args, **kwargs: pytest.fail("it trained"))


@pytest.mark.parametrize("stage", ["safety_alignment", "joint_finetuning"])
def test_without_any_labelled_row_there_is_no_training(fresh_model, make_trainer, make_row, never_trained, stage):
    rows = [make_row(i, category=None, level=None) for i in range(3)]
    with pytest.raises(ValueError, match="None of the 3 training rows has a safety label"):
        make_trainer(fresh_model(), rows, stage=stage).train()
    rows.append(make_row(3, images=0))
    with pytest.raises(ValueError, match="None of the 4 training rows has both a safety label and a picture"):
        make_trainer(fresh_model(), rows, stage=stage).train()


def test_the_language_model_alone_needs_no_labels(fresh_model, make_trainer, make_row):
    rows = [make_row(i, category=None, level=None) for i in range(3)]
    make_trainer(fresh_model(), rows, stage="joint_finetuning", trainable=["language_model"]).train()


def test_a_stream_without_any_labelled_row_is_an_error_at_its_end(fresh_model, make_trainer, make_row):
    rows = TorchStream([make_row(i, category=None, level=None) for i in range(4)])
    with pytest.raises(ValueError, match="No training row had a safety label and a picture"):
        make_trainer(fresh_model(), rows).train()


def test_unlabelled_rows_are_counted(fresh_model, make_trainer, make_row, caplog):
    rows = [make_row(0), make_row(1, category=None, level=None), SafetyRow("q", [picture(1)], chat("Is it?"))]
    make_trainer(fresh_model(), rows).train()
    assert "2 of 3 training rows have no safety label" in caplog.text
    assert "1 of them have no answer either and teach nothing" in caplog.text


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"category": "politcs"}, "row '4': .*politcs"),
        ({"messages": []}, "row '4'"),
        (["a list"], "row 4: expected a dict with `messages` and `images`, or a SafetyRow, got list"),
        (
            SafetyRow("far", [picture(1)], chat("Is it?"), 9, 0),
            "row 'far': `category` 9 is not one of the model's 7",
        ),
    ],
)
def test_a_bad_row_is_found_before_training(fresh_model, make_trainer, records, never_trained, bad, message):
    plain = {"messages": [QUESTION, ANSWER], "images": [picture(1)], "level": "high"}
    bad = {**plain, **bad} if isinstance(bad, dict) else bad
    with pytest.raises(DataError, match=message):
        make_trainer(fresh_model(), [*records, bad]).train()


def test_several_sets_or_a_table_are_no_training_set(fresh_model, make_trainer, rows):
    for several in ({"train": rows}, datasets.DatasetDict(train=datasets.Dataset.from_list([{"a": 1}]))):
        with pytest.raises(ValueError, match=r"`train_dataset` is a dict of 'train'; pass .* `rows\['train'\]`"):
            make_trainer(fresh_model(), several)
    table = datasets.Dataset.from_list([{"a": 1}]).to_pandas()
    with pytest.raises(ValueError, match=r"pass the rows of a table, `table.to_dict\('records'\)`"):
        make_trainer(fresh_model(), table)


def test_rows_with_nothing_to_learn_from_have_no_loss(fresh_model, make_trainer):
    question = SafetyRow("q", [picture(3)], chat("Is it?"))
    assert not [name for name in make_trainer(fresh_model()).predict([question]).metrics if "loss" in name]


@pytest.mark.parametrize("rows", [iter([]), 7, "rows.jsonl"])
def test_what_is_no_data_set_is_refused(fresh_model, make_trainer, rows):
    with pytest.raises(ValueError, match="A data set must be a list, a `datasets` or torch data set of rows, got"):
        make_trainer(fresh_model(), rows, max_steps=2)


def test_a_too_long_row_is_found_before_training(fresh_model, make_trainer, make_row, never_trained):
    rows = [make_row(0), make_row(1, answer="The answer is yes. " * 30)]
    with pytest.raises(DataError, match=r"row 'row-1': \d+ tokens, `max_length` is 130"):
        make_trainer(fresh_model(), rows, max_length=130).train()


def test_a_too_long_row_to_evaluate_on_is_found_before_training(fresh_model, make_trainer, make_row, never_trained):
    rows = [make_row(0), make_row(1, answer="The answer is yes. " * 30)]
    for evaluated in (rows, {"first": rows[:1], "second": rows}):
        with pytest.raises(DataError, match=r"row 'row-1': \d+ tokens, `max_length` is 130"):
            make_trainer(fresh_model(), rows[:1], evaluated, max_length=130, eval_strategy="epoch").train()


def test_a_too_long_row_of_a_stream_is_found_when_it_is_reached(fresh_model, make_trainer, make_row):
    rows = TorchStream([make_row(0), make_row(1, answer="The answer is yes. " * 30)])
    with pytest.raises(DataError, match=r"row 'row-1': \d+ tokens, `max_length` is 130"):
        make_trainer(fresh_model(), rows, max_length=130).train()


def test_the_estimate_of_a_row_s_length_is_an_upper_bound_and_decodes_no_picture(processor, model, rows, monkeypatch):
    encoder = RowEncoder(processor, model.config, hint_probability=1.0)
    lengths = [len(row["input_ids"]) for row in (EncodedDataset(rows, encoder)[i] for i in range(len(rows)))]
    monkeypatch.setattr(SafetyRow, "load_images", lambda self: pytest.fail("decoded"))
    estimate = LengthEstimate(encoder)
    slack = estimate.longest_hint + 40
    for row, length in zip(rows, lengths, strict=True):
        assert estimate.may_exceed(row, length - 1)
        assert not estimate.may_exceed(row, length + slack)


# -- numbers that are none


def test_a_loss_that_is_not_finite_stops_with_the_batch_s_rows(fresh_model, make_trainer, make_row):
    model = fresh_model()
    with torch.no_grad():
        model.safety.head.level_classifier.weight.fill_(torch.inf)
    rows = [make_row(i) for i in range(4)]
    settings = dict(train_sampling_strategy="sequential", per_device_train_batch_size=2)
    with pytest.raises(
        ValueError, match=r"The loss is nan \(.*safety_level_loss nan.*\) at step 0, rows 'row-0', 'row-1'\."
    ):
        make_trainer(model, rows, **settings).train()
    with pytest.raises(ValueError, match=r"The loss is nan .* rows 'row-2', 'row-3'"):
        make_trainer(model).evaluate(rows[2:])


@pytest.mark.parametrize("max_grad_norm", [0, 1.0])
def test_a_gradient_that_is_not_finite_stops_with_the_step_s_rows(
    fresh_model, make_trainer, make_row, weights, differing, max_grad_norm
):
    model = fresh_model()
    trainer = make_trainer(
        model,
        [make_row(i) for i in range(4)],
        train_sampling_strategy="sequential",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_grad_norm=max_grad_norm,
    )
    bias = model.safety.head.level_classifier.bias
    bias.register_hook(lambda gradient: gradient * torch.nan if trainer.state.global_step else gradient)
    with pytest.raises(ValueError, match="The gradient's norm is nan at step 1, rows 'row-2', 'row-3'"):
        trainer.train()
    assert all(weight.isfinite().all() for weight in weights(model).values())


def test_a_verdict_that_is_no_number_is_never_taken_for_no_picture(fresh_model, make_trainer, make_row):
    model = copy.deepcopy(fresh_model())
    with torch.no_grad():
        model.safety.head.category_classifier.bias.fill_(torch.nan)
    rows = [make_row(0, images=0), make_row(1, category=None, level=None)]  # whose loss does not show it
    trainer = make_trainer(model, compute_metrics=trainer_metrics, per_device_eval_batch_size=2)
    with pytest.raises(ValueError, match="`safety_category_logits` are not finite for rows 'row-1'"):
        trainer.evaluate(rows)
