"""Training on half-precision, quantised and offloaded models: both stages, resuming, and clear refusals."""

import shutil

import pytest
import torch
from cpus import CPUS, pretend_cpu
from tiny import SIZES
from transformers import BitsAndBytesConfig

from safevlm import SafeVlmForConditionalGeneration
from safevlm.trainer import Recipe, run_schedule

CONFIGS = {
    "8 bit": BitsAndBytesConfig(load_in_8bit=True),
    "4 bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}
COMMON = dict(
    max_steps=2,
    learning_rate=1e-3,
    per_device_train_batch_size=2,
    save_strategy="steps",
    save_steps=1,
    use_cpu=True,
    disable_tqdm=True,
    report_to="none",
)
STAGE_1 = dict(stage="safety_alignment", **COMMON)
QLORA = dict(stage="joint_finetuning", lora_r=4, **COMMON)


def quantized_model(model_folders, bits):
    torch.manual_seed(0)
    return SafeVlmForConditionalGeneration.from_base(
        model_folders / "base", base_kwargs={"quantization_config": CONFIGS[bits]}, **SIZES
    )


@pytest.mark.parametrize("bits, cpu", [("8 bit", None), *(("4 bit", cpu) for cpu in CPUS)])
def test_both_stages_train_on_a_quantised_base_and_resume(
    model_folders, processor, rows, batch, bits, cpu, monkeypatch, tmp_path
):
    if cpu is not None:
        pretend_cpu(monkeypatch, cpu)
    model = quantized_model(model_folders, bits)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = run_schedule(model, processor, rows, tmp_path, Recipe([STAGE_1, QLORA]))
    first = SafeVlmForConditionalGeneration.from_pretrained(tmp_path / "1-safety_alignment" / "model")
    assert first.is_quantized
    changed = {name for name, tensor in first.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("safety.") for name in changed)

    # LoRA is merged into the dequantised weights: in 4 bit its changes would be rounded away.
    assert not getattr(trained, "is_quantized", False)
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
    again = SafeVlmForConditionalGeneration.from_pretrained(tmp_path / "2-joint_finetuning" / "model")
    torch.testing.assert_close(again.assess(**batch).score, trained.assess(**batch).score)

    for stage in ("1-safety_alignment", "2-joint_finetuning"):  # as if interrupted in the second step
        shutil.rmtree(tmp_path / stage / "model")
        shutil.rmtree(tmp_path / stage / "checkpoint-2")
    resumed = run_schedule(quantized_model(model_folders, bits), processor, rows, tmp_path, Recipe([STAGE_1, QLORA]))
    expected = trained.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_dict().items())


@pytest.mark.parametrize("cpu", CPUS)
def test_qlora_ends_as_the_quantised_model_with_its_adapter(
    model_folders, processor, rows, batch, cpu, monkeypatch, tmp_path
):
    from peft import PeftModel

    pretend_cpu(monkeypatch, cpu)
    model = SafeVlmForConditionalGeneration.from_pretrained(
        model_folders / "safe", quantization_config=CONFIGS["4 bit"], dtype=torch.float32
    )
    trained = run_schedule(model, processor, rows, tmp_path, Recipe([{**QLORA, "learning_rate": 1e-2}]))
    fresh = SafeVlmForConditionalGeneration.from_pretrained(
        model_folders / "safe", quantization_config=CONFIGS["4 bit"], dtype=torch.float32
    )
    fresh.train().eval()  # never packed again: the products of packed weights are in bfloat16
    with torch.no_grad():
        untrained = fresh(**batch).logits
        adapted = PeftModel.from_pretrained(fresh, tmp_path / "1-joint_finetuning" / "adapter").eval()
        expected, found = adapted(**batch).logits, trained(**batch).logits
    assert (found - expected).abs().max() < 0.05 * (found - untrained).abs().max()


def test_a_quantised_language_model_cannot_be_trained_in_full(model_folders, processor, rows, tmp_path):
    with pytest.raises(ValueError, match="'language_model', but its weight .* is quantised.*lora_r"):
        run_schedule(
            quantized_model(model_folders, "4 bit"), processor, rows, tmp_path, Recipe([{**QLORA, "lora_r": 0}])
        )


def test_an_offloaded_model_cannot_be_trained(model_folders, processor, rows, tmp_path):
    model = SafeVlmForConditionalGeneration.from_pretrained(
        model_folders / "safe", device_map={"base": "disk", "safety": "cpu"}, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(ValueError, match="weights of the model are offloaded to CPU or disk"):
        run_schedule(model, processor, rows, tmp_path / "out", Recipe([STAGE_1]))


def test_fsdp_on_the_cpu_is_refused_not_ignored(fresh_model, processor, rows, tmp_path):
    with pytest.raises(ValueError, match="(?i)fsdp"):
        run_schedule(fresh_model(), processor, rows, tmp_path, Recipe([{**STAGE_1, "fsdp": True}]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_are_not_rounded_away_in_half_precision(model_folders, processor, rows, dtype, tmp_path):
    """Steps of 2e-4 on weights of about 0.1: bfloat16 would round most of them away one by one."""
    full, half = (
        SafeVlmForConditionalGeneration.from_pretrained(model_folders / "safe", dtype=d)
        for d in (torch.float32, dtype)
    )
    start = {name: tensor.clone().float() for name, tensor in half.safety.state_dict().items()}
    changes = dict(max_steps=12, learning_rate=2e-4, lr_scheduler_type="constant", save_strategy="no")
    recipe = Recipe([{**STAGE_1, **changes}])
    full = run_schedule(full, processor, rows, tmp_path / "full", recipe)
    half = run_schedule(half, processor, rows, tmp_path / "half", recipe)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    name = "head.text_input.weight"
    moved = (half.safety.state_dict()[name].float() - start[name]).abs().mean()
    expected = (full.safety.state_dict()[name] - start[name]).abs().mean()
    assert 0.7 < moved / expected < 1.4


def test_a_half_precision_run_resumes_to_the_same_weights(model_folders, processor, rows, tmp_path):
    def load():
        return SafeVlmForConditionalGeneration.from_pretrained(model_folders / "safe", dtype=torch.bfloat16)

    recipe = Recipe([STAGE_1])
    trained = run_schedule(load(), processor, rows, tmp_path, recipe)
    shutil.rmtree(tmp_path / "1-safety_alignment" / "model")
    shutil.rmtree(tmp_path / "1-safety_alignment" / "checkpoint-2")
    resumed = run_schedule(load(), processor, rows, tmp_path, recipe)
    expected = trained.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_dict().items())


def test_a_float16_model_is_not_mixed_with_bfloat16(model_folders, processor, rows, tmp_path):
    model = SafeVlmForConditionalGeneration.from_pretrained(model_folders / "safe", dtype=torch.float16)
    with pytest.raises(ValueError, match="in float16, which `bf16=true` cannot be mixed with.*dtype='bfloat16'"):
        run_schedule(model, processor, rows, tmp_path, Recipe([{**STAGE_1, "bf16": True}]))
