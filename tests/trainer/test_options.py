"""Options are declared once, as a dataclass: flags, their help, and the object that a command passes on."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from safevlm.trainer.options import add_options, option, option_words, options_from
from safevlm.trainer.recipe import Recipe, StageFolder


def pairs(items):
    return dict(item.split("=") for item in items)


@dataclass(frozen=True)
class Inner:
    split: str | None = option("which split", None)
    on_error: str = option("skip bad rows", "raise", flag="--skip", action="store_const", const="skip")
    hidden: int = 3


@dataclass(frozen=True)
class Outer:
    base: str | Path = option("the base")
    data: list[str] = option("the data")
    inner: Inner = field(default_factory=Inner)
    holdout: float = option("the share", 0.1)
    fast: bool = option("be fast", False)
    output: Path | None = option("the folder", None)
    overrides: dict = option(
        "pairs", {}, flag="--set", parse=lambda items: dict(i.split("=") for i in items), nargs="*"
    )


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser(prog="test")
    add_options(parser, Outer)
    return parser


EVERYTHING = Outer("b", ["x", "y z"], Inner("train", "skip"), 0.5, True, Path("out"), {"a": "1"})


@pytest.mark.parametrize("options", [Outer("b", ["x"]), EVERYTHING], ids=["defaults", "everything"])
def test_the_words_of_options_make_the_same_options(parser, options):
    assert options_from(parser.parse_args(option_words(options)), Outer) == options


def test_words_leave_out_defaults_unless_they_are_wanted():
    assert option_words(Outer("b", ["x"])) == ["--base", "b", "--data", "x"]
    assert option_words(Outer("b", ["x"]), always=("holdout",))[-2:] == ["--holdout", "0.1"]


def test_help_shows_the_text_and_the_default_and_fields_without_help_are_no_flags(parser):
    text = " ".join(parser.format_help().split())
    assert "--holdout HOLDOUT the share (default: 0.1)" in text and "--skip skip bad rows" in text
    assert "--hidden" not in text and "(default: None)" not in text and "(default: False)" not in text


def test_a_field_without_a_default_is_required(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["--base", "b"])
    assert "required: --data" in capsys.readouterr().err


def test_a_command_can_leave_options_out_and_ask_for_exactly_one_of_several():
    parser = argparse.ArgumentParser()
    add_options(parser, Inner, without=("on_error",))
    assert options_from(parser.parse_args([]), Inner) == Inner()
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, Inner, one_of=("split", "on_error"))
    assert options_from(parser.parse_args(["--skip"]), Inner).on_error == "skip"
    for words in ([], ["--skip", "--split", "a"]):
        with pytest.raises((SystemExit, argparse.ArgumentError)):
            parser.parse_args(words)


def test_a_run_s_stage_folders_are_named_by_the_recipe_and_found_again(tmp_path):
    recipe = Recipe([{"stage": "safety_alignment"}, {"stage": "joint_finetuning"}])
    folders = recipe.folders(tmp_path)
    assert [folder.path.name for folder in folders] == ["1-safety_alignment", "2-joint_finetuning"]
    assert StageFolder.find(tmp_path) == []
    for folder in reversed(folders):
        folder.path.mkdir()
    assert StageFolder.find(tmp_path) == folders and folders[1].model == tmp_path / "2-joint_finetuning" / "model"
