"""Whatever goes wrong in a command is one line and exit code 1; `--verbose` shows the traceback."""

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
import zipfile

import pytest
import yaml
from safetensors import SafetensorError
from tiny import picture

from safevlm.trainer.cli import main
from safevlm.trainer.commands import ask
from safevlm.trainer.commands.common import model_config


@pytest.fixture
def run(capsys):
    """`run(*arguments)`: exit code, and the one line that the command wrote about what is wrong."""

    def call(*arguments):
        code = main([str(a) for a in arguments])
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if line.startswith("safevlm ")]
        assert len(lines) == 1 and err.endswith(lines[0] + "\n") and "Traceback" not in err, err
        return code, lines[0]

    return call


@pytest.fixture
def broken(monkeypatch):
    """`broken(error)` makes `safevlm assess` end with it."""

    def call(error):
        def fail(args):
            raise error

        monkeypatch.setattr(ask, "run_assess", fail)
        return ["assess", "picture.png", "--model", "m"]

    return call


def caused(error, cause):
    error.__cause__ = cause
    return error


ERRORS = [
    (ValueError("`x` must be\n  positive."), "`x` must be positive."),
    (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
    (PermissionError(errno.EACCES, "Permission denied", "out"), "[Errno 13] Permission denied: 'out'"),
    (yaml.YAMLError("bad YAML"), "bad YAML"),
    (ImportError("pip install it"), "pip install it"),
    (KeyError("image"), "KeyError: 'image' (--verbose shows where)"),
    (TypeError("no number"), "TypeError: no number (--verbose shows where)"),
    (RuntimeError("CUDA out of memory."), "RuntimeError: CUDA out of memory. (--verbose shows where)"),
    (SafetensorError("header too small"), "SafetensorError: header too small (--verbose shows where)"),
    (zipfile.BadZipFile("no zip"), "BadZipFile: no zip (--verbose shows where)"),
    (RecursionError("too deep"), "RecursionError: too deep (--verbose shows where)"),
    (MemoryError(), "MemoryError (--verbose shows where)"),
    (FileNotFoundError(), "FileNotFoundError (--verbose shows where)"),
    (KeyboardInterrupt(), "Interrupted; repeat the command to resume."),
    (caused(ImportError("cannot import torch"), KeyboardInterrupt()), "Interrupted; repeat the command to resume."),
]


@pytest.mark.parametrize("error, line", ERRORS, ids=lambda value: type(value).__name__)
def test_every_kind_of_error_is_one_line(run, broken, error, line):
    assert run(*broken(error)) == (1, f"safevlm assess: {line}")


def test_a_long_message_is_cut(run, broken):
    _, line = run(*broken(RuntimeError("Missing key. " * 10_000)))
    assert len(line) < 3000 and "[...]" in line


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyError("image"), KeyboardInterrupt()], ids=repr)
def test_verbose_shows_the_traceback(broken, error):
    with pytest.raises(type(error)):
        main([*broken(error), "--verbose"])


INTERRUPTED = """
import os, signal, sys
sys.argv[0] = "safevlm"

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
from safevlm.trainer.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "module, arguments",
    [
        ("torch.nn", ["assess", "0.png", "--model", "base", "--device", "cpu"]),
        ("numpy", ["data", "mix", "recipe.yaml", "--output", "out"]),
    ],
)
def test_ctrl_c_in_the_middle_of_an_import_is_one_line(world, module, arguments):
    if module == "torch.nn":
        (world / "base/config.json").write_text(json.dumps({"model_type": "safevlm"}))
    command = [sys.executable, "-c", INTERRUPTED, module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=world, timeout=100)
    line = f"safevlm {arguments[0]}: Interrupted; repeat the command to resume.\n"
    assert (done.returncode, done.stderr) == (1, line)


def test_ctrl_c_before_the_command_begins_shows_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "yaml", "data"], capture_output=True, text=True, cwd=tmp_path, timeout=100
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    rows = [{"id": f"{i}", "image": "gone.png", "conversations": []} for i in range(5000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = f"{sys.executable} -m safevlm data check rows.jsonl | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert done.stdout.count("\n") == 1 and "Broken pipe" not in done.stderr and "Traceback" not in done.stderr


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path, model_folders):
    picture(0).save(tmp_path / "0.png")
    shutil.copytree(model_folders / "base", tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return tmp_path


COMMANDS = {
    "assess": ["assess", "0.png", "--model", "MODEL"],
    "answer": ["answer", "0.png", "What?", "--model", "MODEL"],
    "calibrate": ["calibrate", "--model", "MODEL", "--data", "rows.jsonl", "--target-fpr", "0.1", "--output", "out"],
    "evaluate": ["evaluate", "MODEL", "--tasks", "figstep", "--data", ".", "--output", "out"],
    "train": ["train", "--base", "MODEL", "--data", "rows.jsonl", "--output", "out"],
    "card": ["card", "MODEL"],
    "push": ["push", "MODEL", "--repo-id", "a/b", "--dry-run"],
    "code": ["code", "MODEL"],
    "serve": ["serve", "MODEL"],
    "space": ["space", "--model", "MODEL"],
}
SAFE_ONLY = [name for name in COMMANDS if name not in ("evaluate", "train", "code")]


@pytest.fixture
def with_model(run, world, monkeypatch):
    """`with_model(command, model)`: runs a command about a model in the folder `world`."""
    monkeypatch.chdir(world)

    def call(command, model, *more):
        code, line = run(*(str(model) if word == "MODEL" else word for word in COMMANDS[command]), *more)
        assert code == 1 and str(model) in line and "--verbose shows" not in line, line
        return line

    return call


@pytest.mark.parametrize("command", SAFE_ONLY)
def test_a_plain_base_is_told_to_be_no_safevlm(with_model, command):
    assert "of type 'llava', not a SafeVLM" in with_model(command, "base")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_is_nowhere_is_named(with_model, command):
    assert re.search("(not|neither) a (local )?folder", with_model(command, "nobody/none"))


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "push"])
def test_an_empty_folder_is_named(with_model, world, command):
    (world / "empty").mkdir()
    assert "holds no config.json" in with_model(command, "empty")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("text", ["{", "[]", "\x00"], ids=["cut off", "a list", "binary"])
def test_a_config_that_is_none_is_named(with_model, world, command, text):
    (world / "base" / "config.json").write_text(text)
    assert "config.json" in with_model(command, "base")


@pytest.mark.parametrize("command", ["assess", "evaluate", "train", "serve", "space"])
def test_damaged_weights_are_named_before_anything_is_loaded(with_model, world, command):
    weights = world / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors is not a complete safetensors file" in with_model(command, "base")


@pytest.mark.parametrize("command", ["assess", "calibrate", "evaluate", "serve"])
def test_a_device_that_is_not_there_is_named(world, run, command, monkeypatch, tmp_path):
    monkeypatch.chdir(world)
    config = world / "base" / "config.json"
    config.write_text(config.read_text().replace('"llava"', '"safevlm"'))
    code, line = run(*("base" if word == "MODEL" else word for word in COMMANDS[command]), "--device", "cuda:99")
    assert code == 1 and "--device 'cuda:99' cannot be used here" in line


@pytest.mark.parametrize(
    "tasks, message",
    [
        ("nosuch", "--tasks 'nosuch' is not a known task. Ours are figstep,"),
        ("mme,figstep", "Task 'figstep': no file 'figstep/data/question/safebench.csv' in the data folder"),
        ("rtvlm", "Task 'rtvlm_misleading': no file "),
    ],
)
def test_tasks_that_cannot_be_are_told(world, run, tasks, message):
    code, line = run("evaluate", world / "base", "--tasks", tasks, "--data", world, "--output", world / "out")
    assert code == 1 and message in line


@pytest.mark.parametrize("command", ["assess", "answer", "calibrate", "evaluate", "serve"])
@pytest.mark.parametrize("policy, message", [("stric", "presets default,"), ("gone.yaml", "gone.yaml does not exist")])
def test_a_policy_that_is_none_is_told_before_the_model_is_looked_at(world, run, command, policy, message):
    code, line = run(*COMMANDS[command], "--policy", policy)
    assert code == 1 and f"--policy {policy!r}: " in line and message in line


def test_without_network_one_try_is_enough(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    calls = []

    def unreachable(*args, **kwargs):
        calls.append(args)
        raise HTTPError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    message = "--base 'nobody/none' is not a local folder.*cannot be reached .Name or service"
    with pytest.raises(ValueError, match=message):
        model_config("nobody/none", "--base")
    assert len(calls) == 1


@pytest.mark.parametrize(
    "command",
    [
        ["data", "check", "rows.jsonl", "--labels", "nobody/none"],
        ["train", "--base", "base", "--data", "rows.jsonl", "--output", "out", "--labels", "nobody/none"],
        [*COMMANDS["evaluate"], "--compare", "base=nobody/none"],
        [*COMMANDS["evaluate"], "--compare", "guard:nobody/none"],
        [*COMMANDS["evaluate"], "--judge", "hf:nobody/none"],
    ],
    ids=lambda command: " ".join(command[-2:]),
)
def test_each_argument_that_names_a_model_asks_the_hub_once(world, run, command, monkeypatch):
    from huggingface_hub.errors import HTTPError

    def unreachable(*args, **kwargs):
        calls.append(args)
        raise HTTPError("Name or service not known")

    calls = []
    monkeypatch.chdir(world)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    code, line = run(*("base" if word == "MODEL" else word for word in command))
    assert code == 1 and "'nobody/none' is not a local folder" in line and len(calls) == 1


@pytest.mark.parametrize("name", ["no such/mo del", "a/b/c", "../x y", "x" * 200])
def test_what_can_be_no_name_on_the_hub_is_told(name):
    with pytest.raises(ValueError, match="not a valid name of a model on the Hub"):
        model_config(name, "MODEL")


def test_a_misspelt_command_gets_a_suggestion(capsys):
    with pytest.raises(SystemExit):
        main(["trian"])
    assert "did you mean 'train'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["data", "chek"])
    assert "did you mean 'check'?" in capsys.readouterr().err
