"""The card: it says what the folder and the facts say, and nothing else."""

import json
import os
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from safevlm import SafetyPolicy, SafeVlmConfig
from safevlm.model_card import refresh_card, write_card
from safevlm.model_card.facts import policy_mark

ORIGIN = {
    "data": "400 held-out questions",
    "command": "safevlm evaluate out/model",
    "device": "2 CPU cores",
    "date": "2026-01-02",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
}
RESULT = {
    "title": "Benchmarks",
    "system": "model",
    "measures": [
        {
            "name": "attack_success_rate",
            "title": "figstep: attack success",
            "task": "figstep",
            "section": "safety",
            "n": 1500,
            "higher_is_better": False,
            "values": {"base": 0.5, "model": 0.0423},
        },
        {
            "name": "judge_score",
            "section": "safety",
            "percent": False,
            "higher_is_better": True,
            "values": {"base": None, "model": 8.26},
        },
        {
            "name": "auroc",
            "section": "safety head",
            "higher_is_better": True,
            "values": {"model": 0.9},
            "intervals": {"model": [0.85, 0.95]},
        },
    ],
    "revision": "abc123",
    **ORIGIN,
}
STAGES = [
    {
        "stage": "safety_alignment",
        "arguments": {"learning_rate": 1e-5, "num_train_epochs": 3},
        "measured": {"seconds": 3720, "device": "A100", "processes": 4, "steps": 1310, "epochs": 3.0, "loss": 0.25},
    },
    {
        "stage": "joint_finetuning",
        "arguments": {"learning_rate": 1e-5, "lora_r": 256},
        "measured": {"seconds": 90, "device": "A100", "co2_kg": 0.0123, "energy_kwh": 0.5},
    },
]
FACTS = {
    "model_name": "My SafeVLM",
    "base_model": {"name": "llava-hf/llava-1.5-7b-hf", "revision": "a" * 40, "license": "llama2"},
    "license": "llama2",
    "license_source": "that of the base model",
    "training": {
        "command": "safevlm train --base llava-hf/llava-1.5-7b-hf",
        "rows": 12000,
        "held_out": 300,
        "skipped": 2,
        "categories": {"politics": 6000, "safe": 6000},
        "data": [
            {"name": "rows.jsonl", "sha256": "f" * 64},
            {"name": "org/data", "sha256": None, "revision": "main", "license": "cc-by-4.0"},
        ],
        "mixes": [
            {
                "file": "train.jsonl",
                "seed": 7,
                "sources": {"vlguard": {"read": 900, "chosen": 800, "left_out": {"bad_row": 3, "leak": 97}}},
            }
        ],
        "stages": STAGES,
    },
    "results": [RESULT],
}
HALF = {"rows": 50, "risky": 20, "clean": 30, "images": 40}
# Something for every section of the card.
EVERYTHING = {
    **FACTS,
    "training": {**FACTS["training"], "about": "Trained on two small sets.", "levels": {"none": 6000, "high": 6000}},
    "calibration": {
        "aim": {"target_fpr": 0.05},
        "fit": HALF,
        "report": HALF,
        "warnings": ["fewer than 100 rows"],
        "measures": [{"name": "ece", "title": "ECE", "values": {"before": 0.2, "after": 0.05}}],
        "policy": {"name": "calibrated", "sha256": "0" * 64},
        **ORIGIN,
    },
    "plots": [
        {"file": "plots/comparison.png", "title": "Safety against usefulness"},
        *({"file": f"plots/{n}.png", "title": f"Plot {n}", "calibration": True} for n in (1, 2, 3)),
    ],
}
RENDERED = Path(__file__).with_name("rendered_card.md")


@pytest.fixture
def saved(tmp_path):
    """`saved(**config)`: a model's folder with only its configuration."""

    def make(**config):
        folder = tmp_path / "saved"
        SafeVlmConfig(**config).save_pretrained(folder)
        return folder

    return make


def section(path, title: str) -> str:
    return path.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0].strip()


def metadata(path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])


def test_the_whole_card_reads_as_the_stored_one(saved):
    """To rewrite it on purpose: `SAFEVLM_REWRITE_CARD=1 python -m pytest tests/model_card/test_card.py`."""
    card = write_card(saved(), EVERYTHING).read_text(encoding="utf-8")
    if os.environ.get("SAFEVLM_REWRITE_CARD"):
        RENDERED.write_text(card, encoding="utf-8")
    assert card == RENDERED.read_text(encoding="utf-8")


def test_the_metadata_names_base_data_licence_and_results(saved):
    path = write_card(saved(), FACTS)
    found = metadata(path)
    assert found["base_model"] == "llava-hf/llava-1.5-7b-hf" and found["base_model_relation"] == "finetune"
    assert found["datasets"] == ["org/data"] and found["license"] == "llama2"
    assert found["pipeline_tag"] == "image-text-to-text" and found["library_name"] == "transformers"
    name, results = model_index_to_eval_results(found["model-index"])
    values = {(r.dataset_name, r.metric_type): (r.metric_value, r.dataset_revision) for r in results}
    assert name == "My SafeVLM" and values == {
        ("figstep", "attack_success_rate"): (0.0423, "abc123"),
        ("Benchmarks", "judge_score"): (8.26, "abc123"),
        ("Benchmarks", "auroc"): (0.9, "abc123"),
    }


def test_the_card_passes_the_hub_s_own_metadata_validation(saved):
    path = write_card(saved(), FACTS)
    card = ModelCard.load(path)  # raises for an invalid model-index
    assert len(card.data.eval_results) == 3
    assert metadata(path) == card.data.to_dict()


def test_results_are_shown_with_all_that_a_number_needs(saved):
    text = section(write_card(saved(), FACTS), "Results")
    assert "| figstep: attack success ↓ | 1,500 | 50.0 | 4.2 |" in text
    assert "| judge&#95;score ↑ |  | – | 8.26 |" in text
    assert "| auroc ↑ |  | – | 90.0 (85.0–95.0) |" in text
    for fact in ("400 held-out questions", "`abc123`", "`safevlm evaluate out/model`", "2 CPU cores", "2026-01-02"):
        assert fact in text
    assert "Not evaluated: over-refusal, general ability." in text


def test_training_shows_counts_hashes_hyper_parameters_and_mixes(saved):
    text = section(write_card(saved(), FACTS), "Training")
    assert "12,000 rows trained on, 300 held out, 2 skipped as unusable." in text
    assert f"| `rows.jsonl` | `{'f' * 64}` | unknown: not stated in the data |" in text
    assert "| `org/data` | `main` | cc-by-4.0 |" in text
    assert "| rows | 6,000 | 6,000 |" in text
    assert "| vlguard |" in text.replace("`", "") and "3 bad row, 97 leak" in text and "(seed 7)" in text
    assert "| `learning_rate` | `1e-05` | `1e-05` |" in text and "| `lora_r` | – | `256` |" in text
    assert "| optimiser steps | 1,310 | – |" in text and "| last logged loss | 0.25 | – |" in text


def test_time_and_co2_are_shown_where_they_were_measured(saved):
    text = section(write_card(saved(), FACTS), "Environmental impact")
    assert "| `safety_alignment` | 1 h 02 min | 4 × A100 | not measured | not measured |" in text
    assert "| `joint_finetuning` | 1.5 min | A100 | 0.5 kWh | 12.3 g |" in text


def test_what_was_not_measured_is_said_to_be_unknown(saved):
    path = write_card(saved(), {"model_name": "M"})
    assert section(path, "Results") == "Not evaluated."
    assert section(path, "Training") == "Not recorded."
    assert section(path, "Environmental impact") == "Not measured."
    assert section(path, "Calibration").startswith("Not calibrated")
    assert "unknown: not chosen by the publisher" in section(path, "Licence")
    text = path.read_text(encoding="utf-8")
    assert (
        "| **Base model** | unknown: not recorded |" in text
        and "| **Base revision** | unknown: not recorded |" in text
    )
    assert not {"model-index", "base_model", "license", "datasets"} & set(metadata(path))


@pytest.mark.parametrize("missing", ["data", "command", "device", "date"])
def test_results_without_their_origin_are_refused(saved, missing):
    folder = saved()
    result = {name: value for name, value in RESULT.items() if name != missing}
    with pytest.raises(ValueError, match=f"lack {missing}: no number without its origin"):
        write_card(folder, {"model_name": "M", "results": [result]})
    assert not (folder / "README.md").exists() and not (folder / "card_facts.json").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"extra": 1}, "unknown fields extra"),
        (
            {"results": [{**RESULT, "measures": [{"name": "x", "section": "safety", "values": {"m": float("nan")}}]}]},
            "nan",
        ),
        ({"results": [{**RESULT, "measures": [{"name": "x", "section": "other", "values": {}}]}]}, "`section`"),
        ({"results": [{**RESULT, "measures": [{"name": "x"}]}]}, "lacks section, values"),
        ({"plots": [{"file": "../../x.png", "title": "x"}]}, "must be a file such as"),
        ({"model_name": 3}, "`model_name`"),
    ],
)
def test_bad_facts_are_refused(saved, change, message):
    with pytest.raises(ValueError, match=message):
        write_card(saved(), {**FACTS, **change})


def test_the_card_states_the_policy_in_force_per_category(saved):
    policy = SafetyPolicy(
        name="mine",
        category_risk_thresholds={"privacy": 0.125},
        category_actions={"privacy": {"low": "refuse"}},
        level_temperature=1.5,
        forced_refusal=False,
    )
    text = section(write_card(saved(safety_policy=policy), FACTS), "Policy in force")
    assert "| politics | 0.5 | `allow` | `caution` | `warn` | `refuse` |" in text
    assert "| privacy | 0.125 | `allow` | `refuse` | `warn` | `refuse` |" in text
    assert "| safe |" not in text and "`mine`" in text
    assert "level 1.5, category\n1." in text and "not calibrated" not in text
    assert "the language model has the last word" in text


def test_a_policy_that_is_off_is_said_loudly(saved):
    path = write_card(saved(safety_policy="off"), FACTS)
    assert "**nothing is enforced**" in section(path, "Policy in force")
    assert "**The policy in force is off" in section(path, "Limits and risks")


def test_results_under_another_policy_are_marked_out_of_date_after_a_refresh(saved):
    folder = saved()
    result = {**RESULT, "policy": policy_mark(SafeVlmConfig().safety_policy)}
    path = write_card(folder, {**FACTS, "results": [result]})
    assert "out of date" not in path.read_text(encoding="utf-8")
    SafeVlmConfig(safety_policy="strict").save_pretrained(folder)
    text = refresh_card(folder).read_text(encoding="utf-8")
    assert "measured under another policy (`default`)" in text and "out of date" in text
    assert "| **Policy in force** | `strict` |" in text


def test_refreshing_changes_nothing_where_nothing_changed(saved):
    folder = saved()
    before = write_card(folder, FACTS).read_bytes()
    assert refresh_card(folder).read_bytes() == before
    assert json.loads((folder / "card_facts.json").read_text(encoding="utf-8")) == FACTS


def test_facts_with_an_error_name_their_file(saved):
    folder = saved()
    write_card(folder, FACTS)
    (folder / "card_facts.json").write_text('{"model_name": "M", "x": 1}')
    with pytest.raises(ValueError, match=r"card_facts\.json: .*unknown fields x"):
        refresh_card(folder)


def test_a_person_s_licence_and_metadata_survive_and_ours_are_refreshed(saved):
    folder = saved()
    path = write_card(folder, {**FACTS, "license": None})
    text = path.read_text(encoding="utf-8").replace(
        "language: en\n", "language: de\nlicense: mit\nextra_gated: true\n"
    )
    path.write_text(text.replace("tags:\n", "tags:\n- mine\n"), encoding="utf-8")
    facts = deepcopy(FACTS)
    facts["results"] = []
    found = metadata(write_card(folder, facts))
    assert (found["license"], found["language"], found["extra_gated"]) == ("mit", "de", True)
    assert "mine" in found["tags"] and "safevlm" in found["tags"] and "model-index" not in found
    assert "| this model | mit" in path.read_text(encoding="utf-8")


def test_a_card_that_a_person_wrote_is_never_overwritten(saved):
    folder = saved()
    (folder / "README.md").write_text("# By hand\n")
    with pytest.raises(ValueError, match="was not written by safevlm"):
        write_card(folder, FACTS)
    assert (folder / "README.md").read_text() == "# By hand\n" and not (folder / "card_facts.json").exists()


def test_broken_metadata_is_an_error_that_says_so(saved):
    folder = saved()
    path = write_card(folder, FACTS)
    path.write_text(path.read_text(encoding="utf-8").replace("language: en", "language: [en"), encoding="utf-8")
    with pytest.raises(ValueError, match="metadata .* not valid YAML"):
        refresh_card(folder)


def test_a_model_without_configuration_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        write_card(tmp_path, FACTS)


def test_plots_are_shown(saved):
    facts = {**FACTS, "plots": [{"file": "plots/comparison.png", "title": "Safety [x]"}]}
    text = section(write_card(saved(), facts), "Results")
    assert "![Safety &#91;x&#93;](plots/comparison.png)" in text
