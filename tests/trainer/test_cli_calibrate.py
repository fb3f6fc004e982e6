"""`safevlm calibrate` on a tiny saved model."""

import json
import shutil

import pytest
from tiny import NO_RISK, RISK, picture, psa_vlm_record, write_jsonl

from safevlm import SafetyPolicy, SafeVlmForConditionalGeneration
from safevlm.trainer.cli import main
from safevlm.trainer.evaluation import read_predictions

PLOTS = ("confusion_matrix", "roc_pr", "reliability", "risk_scores", "trade_off")


@pytest.fixture(scope="module")
def world(model_folders, tmp_path_factory):
    """A saved model and 24 rows about 12 pictures, every second one risky."""
    folder = tmp_path_factory.mktemp("calibrate")
    shutil.copytree(model_folders / "safe", folder / "model")
    (folder / "images").mkdir()
    records = []
    for i in range(24):
        picture(i // 2).save(folder / "images" / f"{i // 2}.png")
        labels, question = (RISK, "Is it yes?") if i % 2 else (NO_RISK, "What is in the picture?")
        records.append(psa_vlm_record(f"row-{i}", f"{i // 2}.png", labels, question, "no"))
    write_jsonl(folder / "rows.jsonl", records)
    return folder


@pytest.fixture
def calibrate(world, capsys):
    def call(*arguments, model=world / "model", output=world / "cal"):
        data = ["--data", world / "rows.jsonl", "--images", world / "images"]
        arguments = ["calibrate", "--model", model, *data, "--output", output, "--device", "cpu", *arguments]
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_it_writes_policy_report_predictions_and_plots(calibrate, tmp_path):
    code, out, err = calibrate("--target-fpr", "0.2", output=tmp_path)
    assert code == 0, err
    policy = SafetyPolicy.from_file(tmp_path / "policy.yaml")
    report = json.loads((tmp_path / "calibration.json").read_text())
    assert policy.risk_threshold == report["thresholds"]["global"] and policy.name == "calibrated"
    assert (
        report["fit"]["rows"] + report["report"]["rows"] == 24 == len(read_predictions(tmp_path / "predictions.jsonl"))
    )
    assert report["fit"]["images"] == report["report"]["images"] == 6
    for name in PLOTS:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "fitted on: 12 rows (6 risky, 6 clean) about 6 images" in out
    assert "warning: 'politics' has too few rows for a threshold of its own" in out
    for name in ("default", "paper", "strict", "present", "calibrated"):
        assert f"\n{name} " in out


def test_apply_makes_it_the_models_own_policy_and_nothing_else_does(calibrate, world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "model")
    before = (tmp_path / "model" / "config.json").read_bytes()
    assert calibrate("--cost-ratio", "5", model=tmp_path / "model", output=tmp_path / "cal")[0] == 0
    assert (tmp_path / "model" / "config.json").read_bytes() == before
    code, out, _ = calibrate("--cost-ratio", "5", "--apply", model=tmp_path / "model", output=tmp_path / "cal")
    assert code == 0 and f"now {tmp_path / 'model'}'s own" in out
    loaded = SafeVlmForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert loaded.resolve_policy() == SafetyPolicy.from_file(tmp_path / "cal" / "policy.yaml")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--target-fpr", "1.5"], r"`target_fpr` must be in [0, 1), got 1.5"),
        (["--cost-ratio", "-1"], "`cost_ratio` must be a number above 0, got -1.0"),
        (["--target-fpr", "0.1", "--policy", "off"], "Policy 'off' is off"),
    ],
)
def test_what_is_wrong_is_one_line(calibrate, tmp_path, arguments, message):
    code, out, err = calibrate(*arguments, output=tmp_path / "cal")
    assert code == 1 and message in err and err.strip().splitlines()[-1].startswith("safevlm calibrate: ")


def test_apply_needs_a_folder(calibrate, tmp_path):
    code, _, err = calibrate("--target-fpr", "0.1", "--apply", model="someone/model", output=tmp_path / "cal")
    assert code == 1 and "--apply needs a model folder on this machine, got --model 'someone/model'" in err
    assert not (tmp_path / "cal").exists()


@pytest.mark.parametrize("aim", [[], ["--target-fpr", "0.1", "--cost-ratio", "5"]])
def test_exactly_one_aim_is_needed(calibrate, aim, capsys):
    with pytest.raises(SystemExit):
        calibrate(*aim)
    assert "--cost-ratio" in capsys.readouterr().err
