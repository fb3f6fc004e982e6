"""Rows, stages and trainers on tiny models, for the training tests."""

import copy
import gc
from pathlib import Path

import pytest
import torch
from tiny import chat, picture, safe_model, tiny_llava

from safevlm.trainer import SafeVlmTrainer, SafeVlmTrainingArguments
from safevlm.trainer.data import SafetyRow


@pytest.fixture(scope="session", autouse=True)
def _fast_garbage_collection():
    """Every training ends with a full collection, which is slow over all that the test session has imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def make_row():
    """`make_row(i, question=..., answer=..., images=1, category=1, level=3)`"""

    def make(i, question="Is it yes?", answer="no", images=1, category=1, level=3):
        answer_turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        pictures = [picture(10 * i + k) for k in range(images)]
        return SafetyRow(f"row-{i}", pictures, chat(question, images) + [answer_turn], category, level)

    return make


@pytest.fixture(scope="session")
def rows(make_row):
    """Eight rows: risky and safe, with 1, 2 and 0 images, labelled and not, with answers of unequal lengths."""
    return [
        make_row(0, category=0, level=1),
        make_row(1, answer="The answer is yes.", category=6, level=0),
        make_row(2, question="What is in the picture?", images=2, category=1, level=2),
        make_row(3, answer="yes", category=None, level=None),
        make_row(4, images=0, category=6, level=0),
        make_row(5, answer="no no no", category=4, level=3),
        make_row(6, question="yes", category=6, level=0),
        make_row(7, answer="What?", category=2, level=2),
    ]


@pytest.fixture
def fresh_model(processor):
    """`fresh_model(**safety)`: a new tiny SafeVLM."""

    def make(**safety):
        return safe_model(tiny_llava(), processor, **safety)

    return make


@pytest.fixture
def arguments(tmp_path):
    """`arguments(**changes)`: training arguments for a short run on the CPU."""

    def make(**changes):
        defaults = dict(
            output_dir=str(tmp_path / "stage"),
            use_cpu=True,
            max_steps=2,
            learning_rate=1e-2,
            per_device_train_batch_size=2,
            save_strategy="no",
            disable_tqdm=True,
        )
        return SafeVlmTrainingArguments(**{**defaults, **changes})

    return make


@pytest.fixture
def make_trainer(processor, arguments):
    """`make_trainer(model, train_dataset=..., callbacks=..., **arguments)`"""

    def make(model, train_dataset=None, eval_dataset=None, compute_metrics=None, callbacks=None, **changes):
        return SafeVlmTrainer(
            model,
            arguments(**changes),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
        )

    return make


@pytest.fixture(scope="session")
def weights():
    """`weights(model)`: a copy of all parameters and buffers by name."""

    def copied(model):
        return {name: tensor.detach().clone() for name, tensor in copy.copy(model.state_dict()).items()}

    return copied


@pytest.fixture(scope="session")
def differing():
    """`differing(a, b)`: the names of tensors that are not bitwise equal."""

    def names(a, b):
        assert a.keys() == b.keys()
        return {name for name in a if not torch.equal(a[name], b[name])}

    return names


@pytest.fixture
def hub(monkeypatch):
    """A loopback Hub that this process takes for the Hub."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "hub"))
    from loopback import taken_for_the_hub

    with taken_for_the_hub(monkeypatch) as running:
        yield running
