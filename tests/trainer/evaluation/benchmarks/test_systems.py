"""What `--compare` means: which checkpoints are asked, and how; and clear errors for what does not exist."""

import pytest
from tiny import tiny_llava

from safevlm.trainer.evaluation.benchmarks.systems import make_systems


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, model):
    """Laid out as `safevlm demo` leaves it."""
    folder = tmp_path_factory.mktemp("run")
    tiny_llava().save_pretrained(folder / "base")
    for place in ("model", "training/1-safety_alignment/model"):
        model.config.save_pretrained(folder / place)
    return folder


def test_a_model_alone_is_one_system(run_folder):
    [system] = make_systems(str(run_folder / "model"), "strict")
    assert (system.name, system.policy) == ("model", "strict")


def test_all_comparisons_in_the_order_asked_for(run_folder):
    model, base = str(run_folder / "model"), str(run_folder / "base")
    compare = [f"base={base}", "guard-prompt", "guard:google/shieldgemma-2-4b-it", "stage1", "stage2", "presets"]
    systems = make_systems(model, None, compare)
    assert [(s.name, s.policy) for s in systems] == [
        ("base", None),
        ("guard-prompt", None),
        ("guard-shieldgemma-2-4b-it", None),
        ("stage1", None),
        ("stage2", None),
        ("policy-default", "default"),
        ("policy-paper", "paper"),
        ("policy-strict", "strict"),
        ("policy-off", "off"),
    ]
    assert [s.checkpoint for s in systems[:3]] == [base] * 3
    assert systems[3].checkpoint == str(run_folder / "training/1-safety_alignment/model")
    assert {s.checkpoint for s in systems[4:]} == {model}
    assert "refuse" in systems[1].prefix and systems[2].guard == "google/shieldgemma-2-4b-it"


def test_a_plain_base_can_be_compared_with_its_guard_prompt(run_folder):
    systems = make_systems(str(run_folder / "base"), None, ["guard-prompt"])
    assert [s.name for s in systems] == ["guard-prompt", "model"]
    assert {s.checkpoint for s in systems} == {str(run_folder / "base")}


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        (["bases"], "--compare 'bases' is none of base, guard-prompt, stage1"),
        (["base"], "pass --compare base=PATH_OR_HUB_ID"),
        (["base=B", "stage2=elsewhere"], "--compare stage2=...: only base and stage1 take a path"),
        (["base=B", "base=B"], "names a system twice"),
        (["base=B", "guard:"], "--compare 'guard:' is none of"),
    ],
)
def test_what_cannot_be_compared_is_said(run_folder, compare, message):
    with pytest.raises(ValueError, match=message):
        make_systems(str(run_folder / "model"), None, compare)


def test_a_plain_base_has_no_stages(run_folder):
    with pytest.raises(ValueError, match="--compare stage1 needs a SafeVLM"):
        make_systems(str(run_folder / "base"), None, ["stage1"])


def test_a_model_without_its_training_folder_needs_the_path_of_stage_1(tmp_path, model):
    model.config.save_pretrained(tmp_path / "deep" / "model")
    with pytest.raises(ValueError, match="No stage-1 model beside .*; pass --compare stage1=PATH"):
        make_systems(str(tmp_path / "deep" / "model"), None, ["base=B", "stage1"])
