"""`safevlm data check | stats | mix` as a user meets them."""

import json
import shutil

import pytest
import yaml
from tiny import NO_RISK, RISK, picture, psa_vlm_record, write_jsonl

from safevlm.trainer.cli import main


@pytest.fixture
def world(tmp_path):
    for number in range(6):
        picture(number).resize((64, 64)).save(tmp_path / f"{number}.png")
    shutil.copy(tmp_path / "0.png", tmp_path / "copy.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:100])
    good = [psa_vlm_record(f"g{n}", f"{n}.png", RISK if n % 2 else NO_RISK) for n in range(6)]
    for name, records in (
        ("good", good),
        ("bad", [*good, psa_vlm_record("b0", "broken.png"), psa_vlm_record("b1", "copy.png", (4, 2))]),
        ("test", [psa_vlm_record("t0", "copy.png")]),
    ):
        write_jsonl(tmp_path / f"{name}.jsonl", records)
    return tmp_path


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main(["data", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_help_of_data_shows_its_actions(capsys):
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    out = capsys.readouterr().out
    assert all(f"\n    {action} " in out for action in ("check", "stats", "mix")) and "Example:" in out


def test_check_is_silent_about_good_rows(world, run):
    code, out, _ = run("check", world / "good.jsonl")
    assert (code, out) == (0, "6 rows of 1 file, 6 images: no problems\n")


def test_check_lists_problems_a_line_each_and_exits_with_1(world, run):
    code, out, err = run("check", world / "bad.jsonl")
    lines = out.splitlines()
    assert code == 1 and len(lines) == 4
    assert lines[0].startswith(f"{world}/bad.jsonl: row g0: has category 6, level 0, but row b1")
    assert lines[1].startswith(f"{world}/bad.jsonl: row b0: image '{world}/broken.png'")
    assert lines[3] == "8 rows of 1 file, 8 images: 3 problems in 3 rows"
    assert "WARNING" not in err and "Traceback" not in err


def test_check_as_json(world, run):
    code, out, _ = run("check", world / "bad.jsonl", "--json")
    assert code == 1
    assert [problem["kind"] for problem in json.loads(out)["problems"]] == ["conflict", "image", "conflict"]


def test_stats_print_a_table_and_the_leaks_and_write_both_files(world, run):
    code, out, _ = run("stats", world / "good.jsonl", "--against", world / "test.jsonl", "--output", world / "stats")
    assert code == 0
    assert "6 rows, 0 more that cannot be read; 6 different images, 0 unusable" in out
    table = {line[:20].strip(): line[20:].split() for line in out.splitlines()[2:11]}
    assert table["illegal risk"] == ["0", "0", "0", "3", "3"] and table["all"] == ["3", "0", "0", "3", "6"]
    assert f"g0 = test row t0 (exact): {world}/0.png ~ {world}/copy.png" in out
    stats = json.loads((world / "stats/stats.json").read_text())
    assert stats["near_distance"] == 24 and len(stats["leaks"]) >= 1
    assert (world / "stats/stats.png").read_bytes().startswith(b"\x89PNG")


def test_stats_that_compared_nothing_do_not_say_that_nothing_leaks(world, run):
    code, out, _ = run("stats", world / "good.jsonl", "--output", world / "stats")
    assert code == 0 and "leaks into test rows: not looked for; name the test data with --against" in out
    assert json.loads((world / "stats/stats.json").read_text())["leaks"] is None


def test_stats_as_json(world, run):
    code, out, _ = run("stats", world / "bad.jsonl", "--json")
    stats = json.loads(out)
    assert code == 0 and stats["rows"] == 8 and stats["images"]["unusable"] == 1
    assert stats["duplicates"]["conflicting_rows"] == 2


def test_mix_writes_a_folder_to_train_on_and_says_how(world, run):
    recipe = {"sources": [{"name": "a", "path": "good.jsonl"}], "holdout": 0.3, "near_distance": 0}
    (world / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, out, _ = run("mix", world / "recipe.yaml", "--output", world / "out")
    assert code == 0
    assert "a: 6 read, 6 chosen" in out and "train.jsonl: 4 rows, 4 images (2 illegal risk, 2 safe)" in out
    assert f"train with: --data {world}/out/train.jsonl --images {world}" in out
    code, out, _ = run("check", world / "out/train.jsonl", world / "out/heldout.jsonl", "--images", world)
    assert code == 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["stats", "gone.jsonl"], ["gone.jsonl", "cannot be read"]),
        (["stats", "good.jsonl", "--near-distance", "900"], ["`distance` must be in 0..255, got 900"]),
        (["mix", "gone.yaml", "--output", "out"], ["gone.yaml", "not found", "paper-stage1"]),
        (["mix", "bad.yaml", "--output", "out"], ["bad.yaml", "unknown entry `holdot`"]),
        (["mix", "paper-stage1", "--output", "out", "--root", "nowhere"], ["vlguard", "is not a folder"]),
    ],
)
def test_bad_input_is_one_clear_line(world, run, arguments, parts, monkeypatch):
    monkeypatch.chdir(world)
    (world / "bad.yaml").write_text("sources: [{name: a, path: good.jsonl}]\nholdot: 0.1\n")
    code, _, err = run(*arguments)
    line = err.splitlines()[-1]
    assert code == 1 and line.startswith("safevlm data: ") and "Traceback" not in err
    assert all(part in line for part in parts), line
    assert not (world / "out").exists()
