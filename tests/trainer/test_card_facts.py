"""What training records for the card, and how the results of evaluate and calibrate get there."""

import hashlib
import json
import shlex
from dataclasses import replace

import pytest
import yaml
from tiny import SIZES, chat, picture, safe_model, tiny_llava, write_rows
from transformers import TrainerCallback, TrainerControl, TrainerState

from safevlm import SafeVlmConfig
from safevlm.model_card import write_card
from safevlm.model_card.facts import policy_mark, portable_command, read_facts
from safevlm.trainer import card_facts
from safevlm.trainer.card_facts import base_facts, data_facts, stage_facts
from safevlm.trainer.card_results import add_calibration, add_evaluation
from safevlm.trainer.cli import build_parser
from safevlm.trainer.data import ReadOptions, SafetyRow
from safevlm.trainer.options import option_words, options_from
from safevlm.trainer.recipe import Recipe
from safevlm.trainer.schedule import run_schedule
from safevlm.trainer.stage.card_callback import CardCallback, read_measured
from safevlm.trainer.training_options import TrainOptions
from safevlm.trainer.training_run import train_from_files

STAGE = {
    "stage": "safety_alignment",
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "report_to": "none",
}


def rows(count: int) -> list[SafetyRow]:
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    return [
        SafetyRow(
            row_id=str(i), images=(picture(i),), messages=[*chat(), answer], category=i % 7, level=3 * (i % 7 != 6)
        )
        for i in range(count)
    ]


# -- the command


READING = ReadOptions("llava", "my own.yaml", "train", "a", "b", assume_safe=True)
OVERRIDES = {"learning_rate": 1e-4, "bf16": True, "max_steps": 3, "warmup_steps": None, "report_to": ["none"]}
GIVEN = dict(base="base", data=["a b.jsonl", "c"], output="out", images="my pictures", recipe="demo")
OPTIONS = TrainOptions(
    **GIVEN, holdout=0.25, dtype="float32", seed=7, labels="labels.yaml", read=READING, overrides=OVERRIDES
)


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS,
        replace(OPTIONS, read=replace(READING, on_error="skip")),
        TrainOptions(**GIVEN),
        TrainOptions(**GIVEN, holdout=0),
    ],
)
def test_the_command_on_a_card_asks_for_what_was_done(options):
    command = portable_command(["safevlm", "train", *option_words(options, always=("holdout",))])
    args = build_parser().parse_args(shlex.split(command)[1:])
    assert options_from(args, TrainOptions) == options
    assert "--holdout" in command  # the figures beside it are on held-out rows


# -- the callback


def test_training_notes_steps_time_device_parameters_and_loss(processor, tmp_path):
    model = safe_model(tiny_llava(), processor)
    recipe = Recipe(stages=[STAGE], safety=dict(SIZES))
    run_schedule(model, processor, rows(8), tmp_path, recipe.with_arguments(use_cpu=True))
    (stage,) = stage_facts(tmp_path, recipe.with_arguments(seed=3))
    measured = stage["measured"]
    assert (measured["steps"], measured["epochs"], measured["rows_per_step"]) == (2, 1.0, 4)
    safety = sum(p.numel() for p in model.safety.parameters())
    assert measured["trainable_parameters"] == safety
    assert measured["parameters"] == sum(p.numel() for p in model.parameters())
    assert measured["seconds"] > 0 and measured["loss"] > 0 and measured["device"]
    assert stage["arguments"]["trainable"] == ["safety"] and stage["arguments"]["seed"] == 3
    assert "co2_kg" not in measured


def run_callback(args, monkeypatch, clock, *, from_step: int, seconds: float, save: bool = True, end: bool = False):
    callback, state = CardCallback(), TrainerState(global_step=from_step, is_world_process_zero=True)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    assert isinstance(callback, TrainerCallback)
    callback.on_train_begin(args, state, TrainerControl(), model=tiny_llava())
    clock[0] += seconds
    state.global_step += 5
    if save:
        callback.on_save(args, state, TrainerControl())
    if end:
        callback.on_train_end(args, state, TrainerControl())


@pytest.fixture
def args(tmp_path):
    from safevlm.trainer import SafeVlmTrainingArguments

    return SafeVlmTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")


def test_the_time_of_an_interrupted_stage_is_that_of_all_its_runs(args, monkeypatch, tmp_path):
    clock = [100.0]
    run_callback(args, monkeypatch, clock, from_step=0, seconds=60)
    clock[0] = 5000.0  # another process, later
    run_callback(args, monkeypatch, clock, from_step=5, seconds=30, end=True)
    assert read_measured(tmp_path)["seconds"] == 90
    run_callback(args, monkeypatch, clock, from_step=0, seconds=10, end=True)  # from the start again
    assert read_measured(tmp_path)["seconds"] == 10


def test_co2_is_noted_where_codecarbon_measured_it(args, monkeypatch, tmp_path):
    header = "timestamp,run_id,duration,emissions,energy_consumed,country_name\n"
    lines = "2026-01-01T00:00:00,a,10.0,0.002,0.01,Germany\n2026-01-01T01:00:00,b,10.0,0.001,0.02,Germany\n"
    (tmp_path / "emissions.csv").write_text(header + lines)
    run_callback(args, monkeypatch, [0.0], from_step=0, seconds=1, end=True)
    measured = read_measured(tmp_path)
    assert measured["co2_kg"] == pytest.approx(0.003) and measured["energy_kwh"] == pytest.approx(0.03)


def test_train_writes_a_card_with_its_facts_and_keeps_a_person_s_words(model_folders, tmp_path):
    rows = write_rows(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({"safety": dict(SIZES), "stages": [{**STAGE, "max_steps": 1}]})
    )

    def train():
        return train_from_files(
            TrainOptions(
                base=model_folders / "base",
                data=[rows],
                output=tmp_path / "out",
                recipe=tmp_path / "recipe.yaml",
                holdout=0.34,
            )
        )

    train()
    card = tmp_path / "out" / "model" / "README.md"
    text = card.read_text(encoding="utf-8")
    facts = read_facts(card.parent)
    assert facts["training"]["rows"] + facts["training"]["held_out"] == 6
    assert facts["training"]["data"][0]["sha256"] == hashlib.sha256(rows.read_bytes()).hexdigest()
    assert facts["training"]["stages"][0]["measured"]["steps"] == 1
    assert facts["results"][0]["measures"] and facts["base_model"]["name"] == "base"
    assert "--holdout 0.34" in facts["training"]["command"] and str(tmp_path) not in json.dumps(facts)
    assert "| level accuracy ↑ |" in text and "Safety head on held-out rows" in text
    card.write_text(text.replace("_None yet.", "Mine."), encoding="utf-8")
    train()
    assert card.read_text(encoding="utf-8") == text.replace("_None yet.", "Mine.")


# -- base and data


def test_a_local_base_is_told_by_its_weights_and_its_card_s_licence(tmp_path):
    folder = tmp_path / "llava"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# x\n")
    assert base_facts(folder, None) == {
        "name": "llava",
        "license": "apache-2.0",
        "files": {"model.safetensors": hashlib.sha256(b"weights").hexdigest()},
    }


@pytest.mark.parametrize("card", ["", "---\nlicense: [a]\n---\n", "---\n: : :\n---\n", "---\n", "no front matter"])
def test_a_base_without_a_licence_has_none(tmp_path, card):
    (tmp_path / "README.md").write_text(card)
    assert base_facts(tmp_path, None)["license"] is None


def test_a_base_on_the_hub_is_told_by_its_commit(monkeypatch):
    config = SafeVlmConfig()
    config._commit_hash = "c" * 40
    monkeypatch.setattr(card_facts, "hub_license", lambda *a: "mit")
    assert base_facts("org/base", config) == {"name": "org/base", "revision": "c" * 40, "license": "mit"}


def test_the_licence_of_a_repository_that_cannot_be_reached_is_unknown():
    assert card_facts.hub_license("org/nowhere-at-all") is None  # HF_HUB_OFFLINE


def test_data_files_have_hashes_and_mixes_their_sources(tmp_path):
    content = b'{"id": 1}\n'
    (tmp_path / "train.jsonl").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    sources = {"s": {"read": 2, "left_out": {"bad_row": 1}, "chosen": 1}}
    manifest = {
        "format": "safevlm-mix/1",
        "recipe": {"seed": 3},
        "sources": sources,
        "splits": {"train": {"sha256": digest}},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    facts = data_facts([tmp_path / "train.jsonl"])
    assert facts["data"] == [{"name": "train.jsonl", "sha256": digest}]
    assert facts["mixes"] == [{"file": "train.jsonl", "seed": 3, "sources": sources}]
    (tmp_path / "train.jsonl").write_bytes(content * 2)  # not what the mix wrote
    assert data_facts([tmp_path / "train.jsonl"])["mixes"] == []


@pytest.mark.parametrize(
    "command, shown",
    [
        ("safevlm train --data /home/me/rows.jsonl", "safevlm train --data rows.jsonl"),
        ("safevlm x --set a=/root/b/c --y ~/z", "safevlm x --set a=c --y z"),
        ("safevlm x 'C:\\Users\\me\\d' rel/path", "safevlm x d rel/path"),
        ("safevlm x '/home/me/my data' --n 3", "safevlm x 'my data' --n 3"),
    ],
)
def test_commands_in_a_card_tell_nothing_of_the_machine(command, shown):
    assert portable_command(command) == shown


# -- evaluation and calibration

ENVIRONMENT = {"device": "2 CPU cores", "torch": "2", "transformers": "5", "python": "3", "date": "2026-01-02"}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    SafeVlmConfig().save_pretrained(folder)
    write_card(folder, {"model_name": "M"})
    return folder


def evaluation(tmp_path, checkpoint, **system):
    output = tmp_path / "results"
    output.mkdir()
    systems = {
        "base": {"system": {"name": "base", "checkpoint": "org/base"}, "metrics": {"figstep": {}}},
        "model": {"system": {"name": "model", "checkpoint": str(checkpoint), **system}, "metrics": {"figstep": {}}},
    }
    for rate, facts in zip((0.9, 0.125), systems.values(), strict=True):
        facts["metrics"] = {"figstep": {"attack_success_rate": rate}}
        facts["num_items"] = {"figstep": {"attack_success_rate": 500}}
    measure = {"value": 0.75, "low": 0.5, "high": 1.0, "num_rows": 40}
    undefined = dict.fromkeys(("value", "low", "high"), None)
    systems["model"]["model_policy"] = policy_mark(SafeVlmConfig().safety_policy)
    systems["model"]["head"] = {"overall": {"level_accuracy": measure, "auroc": {**undefined, "num_rows": 40}}}
    report = {
        "command": "safevlm evaluate /home/me/model --tasks figstep",
        "environment": {**ENVIRONMENT, "safevlm": "0.1.0", "lmms_eval": "0.7.3"},
        "settings": {"data": "data", "limit": None, "seed": 0, "batch_size": 8, "judge": "rules"},
        "tasks": ["figstep"],
        "groups": {},
        "systems": systems,
    }
    (output / "results.json").write_text(json.dumps(report))
    (output / "comparison.png").write_bytes(b"png")
    return output


def test_an_evaluation_gets_onto_the_card_once(folder, tmp_path):
    output = evaluation(tmp_path, folder)
    add_evaluation(folder, output)
    card = add_evaluation(folder, output).read_text(encoding="utf-8")
    (result,) = read_facts(folder)["results"]
    assert result["system"] == "model" and result["command"] == "safevlm evaluate model --tasks figstep"
    assert "| figstep: attack success ↓ | 500 | 90.0 | 12.5 |" in card
    assert "| level accuracy ↑ | 40 | – | 75.0 (50.0–100.0) |" in card and "| AUROC" not in card
    assert card.count("plots/comparison.png") == 1 and (folder / "plots" / "comparison.png").read_bytes() == b"png"
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.125
    assert "out of date" not in card


def test_an_evaluation_before_a_change_of_the_policy_is_marked(folder, tmp_path):
    output = evaluation(tmp_path, folder)
    SafeVlmConfig(safety_policy="strict").save_pretrained(folder)
    card = add_evaluation(folder, output).read_text(encoding="utf-8")
    assert "measured under another policy (`default`)" in card and "out of date" in card


def test_an_evaluation_of_an_older_release_says_that_its_policy_is_unknown(folder, tmp_path):
    output = evaluation(tmp_path, folder)
    report = json.loads((output / "results.json").read_text())
    del report["systems"]["model"]["model_policy"]
    (output / "results.json").write_text(json.dumps(report))
    assert "the policy was not recorded" in add_evaluation(folder, output).read_text(encoding="utf-8")


@pytest.mark.parametrize("system", [{"policy": "strict"}, {"guard": "g"}, {"prefix": "p"}])
def test_an_evaluation_under_another_policy_or_of_another_model_is_refused(folder, tmp_path, system):
    with pytest.raises(ValueError, match="not about .* under its own policy"):
        add_evaluation(folder, evaluation(tmp_path, folder, **system))
    assert "results" not in read_facts(folder)


def test_an_evaluation_of_another_model_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="not about"):
        add_evaluation(folder, evaluation(tmp_path, tmp_path / "other"))
    with pytest.raises(ValueError, match="no results.json"):
        add_evaluation(folder, tmp_path)


def test_a_calibration_gets_onto_the_card_and_is_marked_until_it_is_in_force(folder, tmp_path):
    policy = {**SafeVlmConfig().safety_policy, "name": "calibrated", "level_temperature": 2.0}
    overall = {"ece": {"value": 0.2, "low": 0.1, "high": 0.3, "num_rows": 50}}
    half = {"rows": 50, "risky": 20, "clean": 30, "images": 40}
    report = {
        "model": str(folder),
        "data": [str(tmp_path / "dev.jsonl")],
        "environment": ENVIRONMENT,
        "aim": {"target_fpr": 0.05},
        "seed": 0,
        "fit": half,
        "report": half,
        "warnings": ["few rows"],
        "before": {"overall": overall, "policy": SafeVlmConfig().safety_policy},
        "after": {"overall": {"ece": {**overall["ece"], "value": 0.05, "low": None}}, "policy": policy},
    }
    output = tmp_path / "cal"
    output.mkdir()
    (output / "calibration.json").write_text(json.dumps(report))
    (output / "trade_off.png").write_bytes(b"png")
    card = add_calibration(folder, output).read_text(encoding="utf-8")
    assert "| ECE | 20.0 (10.0–30.0) | 5.0 |" in card and "at most 5 % of clean rows" in card and "- few rows" in card
    assert "plots/trade_off.png" in card
    assert "`safevlm calibrate --model model --data dev.jsonl --target-fpr 0.05 --seed 0`" in card
    assert "measured under another policy (`calibrated`)" in card
    SafeVlmConfig(safety_policy=policy).save_pretrained(folder)
    assert "measured under another policy" not in add_calibration(folder, output).read_text(encoding="utf-8")
    SafeVlmConfig().save_pretrained(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="not about"):
        add_calibration(tmp_path / "elsewhere", output)
