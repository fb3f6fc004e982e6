"""What training added to a base is pushed without it; loaded onto the base again it gives the same model."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import SIZES, encode, tiny_llava, tiny_processor, write_rows
from transformers import AutoModel, AutoModelForImageTextToText

from safevlm import SafeVlmForConditionalGeneration
from safevlm.model_card import push_to_hub
from safevlm.trainer.cli import main
from safevlm.trainer.training_options import TrainOptions
from safevlm.trainer.training_run import train_from_files

pytest.importorskip("peft", reason="peft is not installed; pip install 'safevlm[train]'")

STEPS = {"max_steps": 1, "learning_rate": 0.05, "per_device_train_batch_size": 2, "report_to": "none"}
STAGE_1 = {"stage": "safety_alignment", **STEPS}
STAGE_2 = {"stage": "joint_finetuning", "lora_r": 2, **STEPS}


def train(folder, stages):
    tiny_llava().save_pretrained(folder / "base")
    tiny_processor().save_pretrained(folder / "base")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"safety": dict(SIZES), "stages": stages}))
    train_from_files(
        TrainOptions(
            base=folder / "base",
            data=[write_rows(folder)],
            output=folder / "out",
            recipe=folder / "recipe.yaml",
            holdout=0,
            dtype="float32",
        )
    )
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a base and, in `out`, what both stages trained, the second with LoRA."""
    return train(tmp_path_factory.mktemp("trained"), [STAGE_1, STAGE_2])


def test_lora_and_safety_modules_from_the_hub_make_the_trained_model(hub, trained, processor):
    model = trained / "out" / "model"
    assert main(["push", str(model), "--repo-id", "me/adapter", "--adapter-only"]) == 0
    files = hub.repo("me/adapter").files
    assert [name for name in files if name.endswith(".safetensors")] == ["lora/adapter_model.safetensors"]
    assert "modeling_safevlm.py" not in files
    whole = SafeVlmForConditionalGeneration.from_pretrained(model)
    found = SafeVlmForConditionalGeneration.from_base(trained / "base", safety_adapter="me/adapter")
    expected = whole.state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    inputs = encode(processor, ["What is in the picture?"], [1])
    assert torch.equal(found.generate(**inputs), whole.generate(**inputs))
    # On the untouched base the safety modules alone would be a different model.
    trained_too = [
        name for name, tensor in tiny_llava().state_dict().items() if not tensor.equal(expected[f"base.{name}"])
    ]
    assert trained_too and all("language_model" in name for name in trained_too)


def test_a_policy_that_was_calibrated_afterwards_goes_along(hub, trained, tmp_path):
    config = trained / "out" / "model" / "config.json"
    before = config.read_text()
    changed = json.loads(before)
    changed["safety_policy"]["risk_threshold"] = 0.125
    config.write_text(json.dumps(changed))
    push_to_hub(trained / "out" / "model", "me/adapter", adapter_only=True)
    config.write_text(before)
    files = hub.repo("me/adapter").files
    assert json.loads(files["config.json"])["safety_policy"]["risk_threshold"] == 0.125
    assert b"risk_threshold: 0.125" in files["policy.yaml"]


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageTextToText])
def test_no_auto_class_takes_the_adapter_for_one_of_the_bare_base(hub, trained, auto):
    push_to_hub(trained / "out" / "model", "me/adapter", adapter_only=True)
    with pytest.raises((OSError, ValueError)):
        auto.from_pretrained("me/adapter", trust_remote_code=True)


def test_the_adapter_names_its_base_and_no_folder_of_this_machine(hub, trained):
    push_to_hub(trained / "out" / "model", "me/adapter", adapter_only=True)
    files = hub.repo("me/adapter").files
    assert json.loads(files["lora/adapter_config.json"])["base_model_name_or_path"] == "base"
    assert 'safety_adapter="me/adapter"' in files["README.md"].decode()
    assert not any(str(trained).encode() in content for content in files.values())


def test_an_adapter_with_lora_is_not_put_on_a_quantised_base(trained, tmp_path):
    base = tiny_llava()
    base.is_quantized = True
    shutil.copytree(trained / "out" / "2-joint_finetuning" / "adapter", tmp_path / "lora")
    shutil.copy(trained / "out" / "model" / "config.json", tmp_path)
    with pytest.raises(ValueError, match="lost in a quantised base. Load the base unquantised"):
        SafeVlmForConditionalGeneration.from_base(base, safety_adapter=tmp_path)


def test_lora_that_is_not_all_that_was_trained_is_refused(trained, tmp_path, capsys):
    (trained / "out" / "2-joint_finetuning" / "adapter").rename(tmp_path / "adapter")
    try:
        assert main(["push", str(trained / "out" / "model"), "--repo-id", "me/m", "--adapter-only", "--dry-run"]) == 1
    finally:
        (tmp_path / "adapter").rename(trained / "out" / "2-joint_finetuning" / "adapter")
    assert "trained LoRA, which is not in" in capsys.readouterr().err
    full = train(tmp_path, [{**STAGE_2, "lora_r": 0}, STAGE_2])
    assert load_file(full / "out" / "2-joint_finetuning" / "adapter" / "adapter_model.safetensors")
    assert main(["push", str(full / "out" / "model"), "--repo-id", "me/m", "--adapter-only", "--dry-run"]) == 1
    assert "'joint_finetuning' trained more than the safety modules" in capsys.readouterr().err
