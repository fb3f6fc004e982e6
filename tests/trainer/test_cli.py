"""The `safevlm` command: train, resume, assess, answer, and one clear line for what is wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import NO_RISK, RISK, SIZES, picture, psa_vlm_record, write_jsonl
from transformers import LlamaConfig

from safevlm.trainer.cli import main

SAFEVLM = Path(sys.executable).with_name("safevlm")
RECIPE = {
    "safety": dict(SIZES),
    "stages": [
        {
            "stage": stage,
            "max_steps": 2,
            "learning_rate": 0.01,
            "per_device_train_batch_size": 2,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        for stage in ("safety_alignment", "joint_finetuning")
    ],
}


def record(i, **changes):
    """A row of the training file: every second one risky."""
    labels, answer = (RISK, "no") if i % 2 else (NO_RISK, "The answer is yes.")
    return psa_vlm_record(f"row-{i}", f"{i}.png", labels, "Is it yes?", answer, **changes)


@pytest.fixture(scope="module")
def world(model_folders, tmp_path_factory):
    """A folder with a base model, pictures, rows and a recipe."""
    folder = tmp_path_factory.mktemp("cli")
    shutil.copytree(model_folders / "base", folder / "base")
    LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(folder / "llama")
    (folder / "images").mkdir()
    for i in range(8):
        picture(i).save(folder / "images" / f"{i}.png")
    (folder / "images" / "broken.png").write_bytes((folder / "images" / "0.png").read_bytes()[:200])
    write_jsonl(folder / "rows.jsonl", [record(i) for i in range(8)])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "empty").mkdir()
    return folder


def train_arguments(world, output, **changes):
    arguments = {
        "--base": world / "base",
        "--data": world / "rows.jsonl",
        "--images": world / "images",
        "--recipe": world / "recipe.yaml",
        "--holdout": "0.5",
        "--output": output,
        **changes,
    }
    flat = [str(x) for pair in arguments.items() for x in pair if x is not None]
    return ["train", *flat]


def run_entry_point(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [SAFEVLM, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.fixture(scope="module")
def trained(world):
    """What `safevlm train` wrote, and what it printed."""
    process = run_entry_point(*train_arguments(world, world / "out"))
    assert process.returncode == 0, process.stderr
    return world / "out", process


@pytest.fixture
def run(capsys):
    """`run(*arguments)`: exit code, standard output, standard error."""

    def call(*arguments):
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_train_prints_and_writes_its_report(trained):
    output, process = trained
    printed = json.loads(process.stdout[process.stdout.index("{\n") :])
    assert printed == json.loads((output / "report.json").read_text())
    assert (printed["num_train_rows"], printed["num_eval_rows"], printed["skipped"]) == (4, 4, [])
    assert set(printed["metrics"]) == {"safety_alignment", "joint_finetuning"}
    for metrics in printed["metrics"].values():
        assert {"loss", "level_accuracy", "category_macro_f1", "num_assessed"} <= set(metrics)
        assert 0 <= metrics["level_accuracy"] <= 1 and metrics["num_assessed"] == 4
    assert Path(printed["model"]) == output / "model"


def test_train_leaves_a_folder_per_stage_and_a_whole_model(trained):
    output, _ = trained
    assert {path.name for path in output.iterdir()} == {
        "1-safety_alignment",
        "2-joint_finetuning",
        "model",
        "report.json",
    }
    last = output / "2-joint_finetuning" / "model"
    assert (output / "model" / "model.safetensors").read_bytes() == (last / "model.safetensors").read_bytes()
    assert (output / "model" / "processor_config.json").is_file()


def test_the_same_train_command_again_trains_nothing_and_reports_the_same(world, trained, run, monkeypatch):
    from safevlm.trainer import SafeVlmTrainer

    output, _ = trained
    report = (output / "report.json").read_bytes()
    weights = (output / "model" / "model.safetensors").read_bytes()
    monkeypatch.setattr(SafeVlmTrainer, "training_step", lambda *a, **k: pytest.fail("trained again"))
    code, out, _ = run(*train_arguments(world, output))
    assert code == 0
    assert (output / "report.json").read_bytes() == report
    assert (output / "model" / "model.safetensors").read_bytes() == weights


def test_an_interrupted_train_command_repeated_ends_like_the_uninterrupted_one(
    world, trained, run, tmp_path, monkeypatch
):
    from safevlm.trainer import SafeVlmTrainer

    training_step = SafeVlmTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.args.stage == "joint_finetuning" and self.state.global_step == 1:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SafeVlmTrainer, "training_step", interrupted)
        code, _, err = run(*train_arguments(world, tmp_path / "out"))
        assert_one_clear_line(code, err, "train", "Interrupted; repeat the command to resume.")
    assert not (tmp_path / "out" / "model").exists()
    code, _, _ = run(*train_arguments(world, tmp_path / "out"))
    assert code == 0
    expected = trained[0] / "model" / "model.safetensors"
    assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == expected.read_bytes()


def test_train_into_a_folder_of_another_run_is_refused(world, trained, run):
    code, _, err = run(*train_arguments(world, trained[0], **{"--set": "learning_rate=0.5"}))
    assert code == 1
    assert "holds a training with other settings (learning_rate was 0.01, now 0.5)" in err


def test_a_trained_model_can_be_trained_further(world, trained, run, tmp_path):
    code, _, err = run(
        *train_arguments(world, tmp_path / "more", **{"--base": trained[0] / "model", "--set": "max_steps=1"})
    )
    assert code == 0, err
    assert (tmp_path / "more" / "model" / "model.safetensors").is_file()


def test_a_crash_while_writing_the_final_model_leaves_the_former_one(world, trained, run, monkeypatch):
    import shutil

    output, _ = trained
    weights = output / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"of a former training")
    before = {path.name: path.read_bytes() for path in (output / "model").iterdir() if path.is_file()}

    def copytree(source, target, **kwargs):
        Path(target).mkdir(exist_ok=True)
        (Path(target) / "model.safetensors").write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", copytree)
    code, _, err = run(*train_arguments(world, output))
    assert code == 1 and "No space left on device" in err
    assert before == {path.name: path.read_bytes() for path in (output / "model").iterdir() if path.is_file()}
    weights.write_bytes(whole)


def test_assess_through_the_entry_point_prints_one_verdict_as_json(world, trained):
    process = run_entry_point(
        "assess", world / "images" / "0.png", "--question", "Is it yes?", "--model", trained[0] / "model"
    )
    assert process.returncode == 0, process.stderr
    verdict = json.loads(process.stdout)
    assert verdict["assessed"] is True and verdict["action"] in ("allow", "caution", "warn", "refuse")
    assert sum(verdict["level_probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert sum(verdict["category_probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert verdict["score"] == pytest.approx(1 - verdict["level_probabilities"]["none"], abs=1e-5)


def test_answer_prints_the_answer_and_the_verdict_in_brackets(world, trained, run):
    code, out, _ = run(
        "answer", world / "images/0.png", "Is it yes?", "--model", trained[0] / "model", "--max-new-tokens", 5
    )
    assert code == 0
    line = out.rstrip("\n").splitlines()[-1]
    assert re.fullmatch(r"\[(allow|caution|warn|refuse); [a-z ]+, (none|low|medium|high); risk [01]\.\d{3}\]", line)


def test_answer_as_json_has_answer_and_verdict(world, trained, run):
    arguments = "answer", world / "images/0.png", "Is it yes?", "--model", trained[0] / "model", "--json"
    code, out, _ = run(*arguments, "--max-new-tokens", 5)
    answer = json.loads(out)
    assert code == 0 and set(answer) == {"answer", "safety"}
    assert answer["safety"]["action"] in ("allow", "caution", "warn", "refuse")


def write_policy(folder, **fields):
    path = folder / "policy.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", **fields}))
    return path


def test_the_policy_of_a_call_decides_what_follows(world, trained, run, tmp_path):
    arguments = "answer", world / "images/0.png", "Is it yes?", "--model", trained[0] / "model", "--json"
    refuse_all = write_policy(
        tmp_path, risk_threshold=0.0, level_actions={"low": "refuse", "medium": "refuse", "high": "refuse"}
    )
    answers = {}
    for policy in ("off", "strict", refuse_all):
        code, out, err = run(*arguments, "--policy", policy, "--max-new-tokens", 40)
        assert code == 0, err
        answers[str(policy)] = json.loads(out)
    assert answers["off"]["safety"]["action"] == "off"
    assert answers["strict"]["safety"]["action"] in ("allow", "caution", "warn", "refuse")
    refused = answers[str(refuse_all)]
    assert refused["safety"]["action"] == "refuse"
    assert refused["answer"].startswith("I can't help with this request: it involves")


def test_with_the_policy_off_the_answer_stands_alone(world, trained, run):
    code, out, _ = run(
        "answer",
        world / "images/0.png",
        "no",
        "--model",
        trained[0] / "model",
        "--policy",
        "off",
        "--max-new-tokens",
        3,
    )
    assert code == 0 and not re.search(r"\[\w+; ", out)


@pytest.mark.parametrize("command", ["demo", "train", "assess", "answer"])
def test_help_of_every_command_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    assert f"Example:\n  safevlm {command} " in capsys.readouterr().out


def test_help_shows_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for command in ("demo", "train", "assess", "answer"):
        assert re.search(rf"^    {command} ", out, re.MULTILINE)


# -- bad input --------------------------------------------------------------------------------------------------------


def assert_one_clear_line(code, err, command, *parts):
    lines = [line for line in err.splitlines() if line.startswith(f"safevlm {command}: ")]
    assert code == 1
    assert len(lines) == 1 and err.endswith(lines[0] + "\n"), err
    assert "Traceback" not in err
    for part in parts:
        assert str(part) in lines[0], lines[0]


def test_an_error_through_the_entry_point_is_one_line_and_exit_code_1(world):
    process = run_entry_point("assess", world / "images" / "gone.png", "--model", world / "base")
    assert process.returncode == 1
    assert process.stdout == ""
    assert process.stderr.count("\n") == 1
    assert "gone.png' does not exist" in process.stderr


@pytest.mark.parametrize(
    "image, parts",
    [("gone.png", ["gone.png", "does not exist"]), ("broken.png", ["broken.png", "corrupt", "replace"])],
)
@pytest.mark.parametrize("command", ["assess", "answer"])
def test_a_bad_image_is_named(world, trained, run, command, image, parts):
    question = ["Is it?"] if command == "answer" else []
    code, _, err = run(command, world / "images" / image, *question, "--model", trained[0] / "model")
    assert_one_clear_line(code, err, command, *parts)


@pytest.mark.parametrize(
    "name, what",
    [("base", "is of type 'llava', not a SafeVLM"), ("llama", "'llama'"), ("empty", ""), ("nowhere", "")],
)
def test_a_model_that_is_no_safevlm_is_named(world, run, name, what):
    code, _, err = run("assess", world / "images/0.png", "--model", world / name)
    assert_one_clear_line(code, err, "assess", world / name, what)


@pytest.mark.parametrize("policy, parts", [("strikt", ["strikt", "strict"]), ("gone.yaml", ["gone.yaml"])])
def test_a_bad_policy_is_named(world, trained, run, policy, parts):
    code, _, err = run("assess", world / "images/0.png", "--model", trained[0] / "model", "--policy", policy)
    assert_one_clear_line(code, err, "assess", *parts)


@pytest.mark.parametrize("text", ["level_actions: [", "- a", "risk_threshold: high", "treshold: 1"])
def test_a_bad_policy_file_is_one_line(world, trained, run, tmp_path, text):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    code, _, err = run("assess", world / "images/0.png", "--model", trained[0] / "model", "--policy", path)
    assert_one_clear_line(code, err, "assess")


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"--recipe": "papper"}, ["'papper'", "demo, paper"]),
        ({"--base": "llama"}, ["'llama'", "llava"]),
        ({"--base": "nowhere"}, ["nowhere"]),
        ({"--data": "nowhere.jsonl"}, ["nowhere.jsonl", "check the path"]),
        ({"--images": "nowhere"}, ["nowhere", "is not a folder"]),
        ({"--holdout": "1.5"}, ["`holdout` must be in [0, 1), got 1.5"]),
        ({"--set": "max_steps"}, ["'max_steps' must be NAME=VALUE"]),
        ({"--set": "steps=3"}, ["unknown training arguments steps"]),
        ({"--set": "max_steps=many"}, ["`max_steps` must be a number, got 'many'"]),
        ({"--set": "stage=joint_finetuning"}, ["`stage` cannot be the same for all stages"]),
        ({"--set": "max_steps=["}, ["max_steps=["]),
        ({"--dtype": "float7"}, ["float7"]),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
)
def test_a_bad_train_command_names_what_is_wrong(world, run, tmp_path, changes, parts):
    local = {"llama": world / "llama", "nowhere": world / "nowhere", "nowhere.jsonl": world / "nowhere.jsonl"}
    changes = {name: local.get(value, value) for name, value in changes.items()}
    code, _, err = run(*train_arguments(world, tmp_path / "out", **changes))
    assert_one_clear_line(code, err, "train", *parts)


BAD_ROWS = {
    "missing image": (record(8, image="gone.png"), "gone.png"),
    "corrupt image": (record(8, image="broken.png"), "broken.png"),
    "unknown category": (record(8, safe_type="violence"), "unknown category 'violence'"),
    "unknown level": (record(8, safe_level=9), "unknown level 9"),
    "contradiction": (record(8, image="0.png", safe_type=6, safe_level=3), "contradicts level"),
    "no conversation": (record(8, image="0.png", conversations=[]), "non-empty list"),
}


@pytest.mark.parametrize("bad, what", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_stops_training_with_file_row_and_reason(world, run, tmp_path, bad, what):
    data = write_jsonl(tmp_path / "rows.jsonl", [*(record(i) for i in range(8)), bad])
    code, _, err = run(*train_arguments(world, tmp_path / "out", **{"--data": data}))
    assert_one_clear_line(code, err, "train", data, "line 9", what)
    assert not (tmp_path / "out").exists()


def test_skipped_rows_are_counted_and_named_in_the_report(world, run, tmp_path):
    bad = [{**row, "id": f"bad-{i}"} for i, (row, _) in enumerate(BAD_ROWS.values())]
    data = write_jsonl(tmp_path / "rows.jsonl", [*(record(i) for i in range(8)), *bad])
    changes = {"--data": data, "--skip-bad-rows": None, "--set": "max_steps=1"}
    code, out, err = run(*train_arguments(world, tmp_path / "out", **changes))
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["num_train_rows"] + report["num_eval_rows"] == 8
    assert [entry["row"] for entry in report["skipped"]] == [f"bad-{i}" for i in range(len(bad))]
    for entry, (_, what) in zip(report["skipped"], BAD_ROWS.values(), strict=True):
        assert what in entry["reason"]


def test_when_all_rows_are_skipped_there_is_nothing_to_train_on(world, run, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [record(8, image="gone.png")])
    code, _, err = run(*train_arguments(world, tmp_path / "out", **{"--data": data, "--skip-bad-rows": None}))
    assert_one_clear_line(code, err, "train", "No row to train on", data, "1 skipped")


def test_a_row_that_is_too_long_stops_training_with_its_id(world, run, tmp_path):
    code, _, err = run(*train_arguments(world, tmp_path / "out", **{"--set": "max_length=10"}))
    assert_one_clear_line(code, err, "train", "row 'row-", "`max_length` is 10")


@pytest.fixture
def unlabelled(world, run, tmp_path):
    """`unlabelled(labelled_rows, **set)`: trains on four rows without labels and these; exit code, stderr, report."""

    def train(labelled=(), **changes):
        turns = [{"from": "human", "value": "<image>\nIs it?"}, {"from": "gpt", "value": "yes"}]
        rows = [{"id": f"plain-{i}", "image": f"{i}.png", "conversations": turns} for i in range(4)]
        data = write_jsonl(tmp_path / "plain.jsonl", [*rows, *labelled])
        values = [f"{name}={value}" for name, value in {"max_steps": 1, **changes}.items()]
        arguments = train_arguments(world, tmp_path / "out", **{"--data": data})
        code, _, err = run(*arguments, "--set", *values)
        report = tmp_path / "out" / "report.json"
        return code, err, json.loads(report.read_text()) if report.is_file() else None

    return train


def test_without_any_labelled_row_training_is_an_error(unlabelled):
    code, err, report = unlabelled()
    assert code == 1 and report is None
    assert "training rows has a safety label, so the safety head would stay untrained" in err


def test_unlabelled_rows_are_counted_in_the_report(unlabelled):
    code, err, report = unlabelled([record(i) for i in range(4, 8)])
    assert code == 0, err
    assert 0 < report["num_unlabelled_rows"] <= 4
    assert report["metrics"]["joint_finetuning"]["loss"] > 0


def test_evaluation_while_training_is_on_the_held_out_rows(unlabelled):
    changes = dict(eval_strategy="steps", eval_steps=1, save_strategy="best", metric_for_best_model="lm_loss")
    code, err, report = unlabelled([record(i) for i in range(4, 8)], **changes)
    assert code == 0, err
    assert report["num_eval_rows"] > 0
