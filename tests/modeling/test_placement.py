"""A model split over devices or offloaded to disk answers like the plain one. Disk is a CPU's second device."""

import copy
import warnings

import accelerate
import pytest
import torch
from packaging.version import Version

from safevlm import SafeVlmForConditionalGeneration
from safevlm.backbones import compute_device

VISION, PROJECTOR = "base.model.vision_tower", "base.model.multi_modal_projector"
LANGUAGE, HEAD = "base.model.language_model", "base.lm_head"
BASE_ON_CPU = {VISION: "cpu", PROJECTOR: "cpu", LANGUAGE: "cpu", HEAD: "cpu"}
SPLITS = {
    "one device": "cpu",
    "base offloaded": {"base": "disk", "safety": "cpu"},
    "safety offloaded": {"base": "cpu", "safety": "disk"},
    "projector and embeddings offloaded": {
        "base": "cpu",
        "safety.projector": "disk",
        "safety.head": "cpu",
        "safety.embeddings": "disk",
    },
    "head offloaded": {"base": "cpu", "safety.projector": "cpu", "safety.head": "disk", "safety.embeddings": "cpu"},
    "vision tower offloaded": {**BASE_ON_CPU, VISION: "disk", "safety": "cpu"},
    "language model offloaded": {**BASE_ON_CPU, LANGUAGE: "disk", HEAD: "disk", "safety": "disk"},
}
WHOLE = pytest.param(
    {"": "disk"},
    marks=pytest.mark.skipif(
        Version(accelerate.__version__) < Version("1.15"), reason="accelerate before 1.15 refuses"
    ),
    id="all offloaded",
)


def offloaded(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}


def assert_same(actual, expected, batch):
    with torch.no_grad():
        a, b = actual(**batch), expected(**batch)
    torch.testing.assert_close(a.logits, b.logits)
    torch.testing.assert_close(a.safety_level_logits, b.safety_level_logits)
    torch.testing.assert_close(actual.assess(**batch).score, expected.assess(**batch).score)
    for policy in (None, "off"):
        assert torch.equal(
            actual.generate(**batch, safety_policy=policy), expected.generate(**batch, safety_policy=policy)
        )


@pytest.mark.parametrize("split", [WHOLE, *(pytest.param(split, id=name) for name, split in SPLITS.items())])
def test_a_split_model_answers_as_the_plain_one(model, batch, model_folders, tmp_path, split):
    actual = SafeVlmForConditionalGeneration.from_pretrained(
        model_folders / "safe", device_map=split, offload_folder=tmp_path
    )
    assert bool(offloaded(actual)) == (split != "cpu")
    assert_same(actual, model, batch)


def test_an_automatic_map_keeps_each_safety_module_whole(model, batch, model_folders, tmp_path):
    actual = SafeVlmForConditionalGeneration.from_pretrained(
        model_folders / "safe", device_map="auto", max_memory={"cpu": "440KB"}, offload_folder=tmp_path
    )
    assert set(actual.hf_device_map.values()) == {"cpu", "disk"}
    inside = [name for name in actual.hf_device_map if name.startswith("safety.") and name.count(".") > 1]
    assert not inside, actual.hf_device_map
    assert_same(actual, model, batch)


@pytest.mark.parametrize("device_map", [WHOLE, {"model": "disk", "lm_head": "cpu"}])
def test_safety_modules_go_onto_an_offloaded_base(model, batch, model_folders, tmp_path, device_map):
    actual = SafeVlmForConditionalGeneration.from_base(
        model_folders / "base",
        safety_adapter=model_folders / "adapter",
        base_kwargs={"device_map": device_map, "offload_folder": tmp_path},
    )
    assert not any(name.startswith("safety") for name in offloaded(actual)) and offloaded(actual)
    assert actual.hf_device_map["safety"] == "cpu"
    assert_same(actual, model, batch)


def test_an_offloaded_model_can_be_saved(model, batch, model_folders, tmp_path):
    actual = SafeVlmForConditionalGeneration.from_pretrained(
        model_folders / "safe",
        device_map={**SPLITS["head offloaded"], "base": "disk"},
        offload_folder=tmp_path / "offload",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        actual.save_pretrained(tmp_path / "saved")
    assert_same(SafeVlmForConditionalGeneration.from_pretrained(tmp_path / "saved"), model, batch)
    actual.save_safety_adapter(tmp_path / "adapter")
    adapted = SafeVlmForConditionalGeneration.from_base(model_folders / "base", safety_adapter=tmp_path / "adapter")
    assert_same(adapted, model, batch)


def test_a_model_can_be_made_on_the_meta_device(model):
    with torch.device("meta"):
        empty = SafeVlmForConditionalGeneration(copy.deepcopy(model.config))
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert empty.state_dict().keys() == model.state_dict().keys()


def test_the_compute_device_of_an_offloaded_module_is_where_its_hook_brings_it(model):
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    head = copy.deepcopy(model.safety.head)
    assert compute_device(head) == torch.device("cpu")
    head.to("meta")
    head.text_norm._hf_hook = SequentialHook(AlignDevicesHook(execution_device="cuda:1"))
    assert compute_device(head) == torch.device("cuda:1")
