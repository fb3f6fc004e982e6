"""The command imports nothing heavy before it needs it, and says nothing on stderr that nobody asked for."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from tiny import NO_RISK, RISK, picture, psa_vlm_record, write_jsonl

HEAVY = {
    *("torch", "transformers", "bitsandbytes", "accelerate", "peft", "datasets", "pandas", "pyarrow", "gradio"),
    *("sklearn", "matplotlib", "huggingface_hub", "safetensors", "numpy", "PIL", "fastapi", "openai", "lmms_eval"),
}
COMPUTING = {"torch", "transformers", "bitsandbytes", "accelerate", "peft", "datasets", "pandas", "gradio"}
# As the console script does, which starts with this name.
SCRIPT = """
import json, sys
sys.argv[0] = "safevlm"
from safevlm.trainer.cli import main
try:
    code = main()
except SystemExit as end:
    code = end.code
print("\\nLOADED " + json.dumps([code, list(sys.modules)]))
"""
COMMANDS = ("demo", "train", "assess", "answer", "calibrate", "evaluate", "card", "push", "code", "space", "serve")


def run(*arguments, start=("-c", SCRIPT)):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300
    )


def loaded(*arguments):
    """Exit code of a command, what it printed, and the modules that it loaded."""
    done = run(*arguments)
    printed, _, report = done.stdout.partition("\nLOADED ")
    code, modules = json.loads(report)
    return code, printed, done.stderr, set(modules)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with data."""
    folder = tmp_path_factory.mktemp("imports")
    for i in range(4):
        picture(i).resize((64, 64)).save(folder / f"{i}.png")
    records = [psa_vlm_record(f"r{i}", f"{i}.png", RISK if i % 2 else NO_RISK) for i in range(4)]
    write_jsonl(folder / "rows.jsonl", records)
    (folder / "config.json").write_text('{"model_type": "llava"}')
    (folder / "mix.yaml").write_text("sources: [{name: a, path: rows.jsonl}]\nholdout: 0.5\nnear_distance: 0\n")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [[], ["--help"], ["--version"], ["data"], ["data", "--help"], *([command, "--help"] for command in COMMANDS)],
    ids=" ".join,
)
def test_help_and_version_load_nothing_heavy_and_are_silent_on_stderr(arguments):
    code, out, err, modules = loaded(*arguments)
    assert (code, err) == (0, "") and out.startswith(("usage: safevlm", "safevlm 0"))
    assert not modules & HEAVY and "safevlm.registration" not in modules


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["train"],
        ["data", "chek"],
        ["calibrate", "--model", "m"],
        ["demo", "--seed", "one"],
        ["push", "--x"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_load_nothing_heavy(arguments):
    code, out, err, modules = loaded(*arguments)
    assert code == 2 and not out and err.startswith("usage: ") and "error: " in err
    assert not modules & HEAVY


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", "check", "rows.jsonl"],
        ["data", "stats", "rows.jsonl"],
        ["data", "mix", "mix.yaml", "--output", "mixed"],
        ["card", "nowhere"],
        ["train", "--base", "nobody/none", "--data", "rows.jsonl", "--output", "out"],
        ["assess", "0.png", "--model", "nobody/none"],
        ["evaluate", "nobody/none", "--tasks", "figstep", "--data", ".", "--output", "out"],
        ["evaluate", ".", "--tasks", "nosuch", "--data", ".", "--output", "out"],
        ["evaluate", ".", "--tasks", "mme,rtvlm", "--data", ".", "--output", "out"],
        ["serve", "nobody/none"],
        ["space", "--model", "nobody/none"],
        ["push", "nowhere", "--repo-id", "a/b"],
        ["code", "nowhere"],
    ],
    ids=" ".join,
)
def test_what_computes_nothing_loads_nothing_that_computes(world, arguments, monkeypatch):
    monkeypatch.chdir(world)
    code, _, err, modules = loaded(*arguments)
    assert code == (0 if arguments[0] == "data" else 1), err
    assert not modules & COMPUTING
    assert "kernels" not in err and "Traceback" not in err


def test_code_and_a_dry_run_of_push_need_no_torch(world, monkeypatch, model_folders, tmp_path):
    from safevlm.model_card import write_card

    shutil.copytree(model_folders / "safe", tmp_path / "model")
    write_card(tmp_path / "model", {"model_name": "Tiny"})
    for arguments in (["code", tmp_path / "model"], ["push", tmp_path / "model", "--repo-id", "a/b", "--dry-run"]):
        code, out, err, modules = loaded(*arguments)
        assert (code, err) == (0, ""), out + err
        assert not modules & (COMPUTING - {"transformers"})


@pytest.mark.parametrize("module", ["safevlm", "safevlm.trainer.cli"])
def test_python_m_is_the_command(module):
    done = run("--version", start=("-X", "importtime", "-m", module))
    assert done.returncode == 0 and done.stdout.startswith("safevlm 0")
    assert " torch" not in done.stderr and " transformers" not in done.stderr


def test_the_command_registers_the_classes_when_it_first_asks_for_one():
    code = (
        "import sys; sys.argv[0] = 'bin/safevlm'; import safevlm.trainer; assert 'transformers' not in sys.modules; "
        "from safevlm import SafeVlmConfig; from transformers import AutoConfig, AutoModel; "
        "assert type(AutoConfig.for_model('safevlm')) is SafeVlmConfig and SafeVlmConfig in AutoModel._model_mapping"
    )
    done = run(start=("-c", code))
    assert done.returncode == 0, done.stderr


def test_the_commands_version_is_the_one_that_models_are_saved_with():
    import safevlm
    from safevlm.configuration_safevlm import SAFEVLM_VERSION

    assert safevlm.__version__ == SAFEVLM_VERSION


def test_names_of_the_trainer_are_there_when_asked_for():
    import safevlm.trainer

    assert all(getattr(safevlm.trainer, name).__name__ == name for name in safevlm.trainer.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        safevlm.trainer.Trainer  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Model'"):
        safevlm.Model  # noqa: B018
