"""`safevlm space`: assembles the page and runs or pushes it. The page does not need the package."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))  # for `loopback`

import pytest
import yaml
from huggingface_hub import HfApi
from loopback import taken_for_the_hub

from safevlm.trainer.cli import main
from safevlm.trainer.commands import space

MODEL = "me/model"
THIRD_PARTIES = {"gradio", "numpy", "PIL", "spaces", "starlette", "torch", "transformers"}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_the_page_needs_no_package_beyond_its_requirements(space_folder):
    own = {path.stem for path in space_folder.iterdir()}
    needed = set().union(*(imported(path) for path in space_folder.rglob("*.py")))
    assert needed - set(sys.stdlib_module_names) - own <= THIRD_PARTIES
    required = {line.split(">")[0] for line in (space_folder / "requirements.txt").read_text().splitlines()}
    assert {"gradio", "pillow", "torch", "transformers"} <= required


def test_the_model_starts_where_safevlm_is_not_installed(space_folder, saved_model, tmp_path):
    folder = shutil.copytree(space_folder, tmp_path / "space")
    (folder / "safevlm.py").write_text("raise ImportError('not here')\n")
    code = (
        "import limits; from chat_model import ChatModel, Picture, Turn; from settings import Settings\n"
        "from PIL import Image\n"
        f"model = ChatModel(Settings({str(saved_model)!r}));"
        "print(next(model.assess([Turn('What?', Picture(lambda: Image.new('RGB', (9, 9))))], 'strict'))['assessed'])"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr[-2000:]


def test_the_folder_holds_page_loader_and_examples(space_folder, example):
    page = {path.name for path in (Path(space.__file__).parents[2] / "model_card" / "space").iterdir()}
    files = {path.relative_to(space_folder).as_posix() for path in space_folder.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    added = {"pictures.py", "examples/examples.json", "examples/0.jpg", "examples/1.jpg"}
    assert files == page - {"__pycache__"} | added
    assert [row["image"] for row in json.loads((space_folder / "examples/examples.json").read_text())] == [
        "0.jpg",
        "1.jpg",
    ]


def test_the_readme_has_what_a_space_needs(space_folder):
    _, header, _ = (space_folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert metadata["sdk"] == "gradio" and (space_folder / metadata["app_file"]).is_file()
    assert len(metadata["short_description"]) <= 60  # the Hub's limit
    lowest, highest = "gradio>=6.0,<7", int(metadata["sdk_version"].split(".")[0])
    assert lowest in (space_folder / "requirements.txt").read_text().splitlines() and highest == 6


@pytest.fixture
def started(monkeypatch):
    """The processes that would have been started: command, files of the folder, environment."""
    calls = []

    class Process:
        def __init__(self, command, cwd, env, process_group):
            self.files = {path.name: path.read_bytes() for path in Path(cwd).rglob("*") if path.is_file()}
            self.command, self.env = command, env
            calls.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def wait(self):
            return 0

        def terminate(self):
            pass

    monkeypatch.setattr(space.subprocess, "Popen", Process)
    monkeypatch.setattr(space, "find_spec", lambda name: object())
    return calls


def test_it_runs_the_page_with_what_was_asked_for(started, saved_model, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("risk_threshold: 0.1\n")
    monkeypatch.chdir(saved_model.parent)
    arguments = ["--model", saved_model.name, "--policies", f"strict,{tmp_path / 'mine.yaml'}", "--no-compare"]
    assert main(["space", *arguments, "--port", "7999", "--title", "Ours"]) == 0
    (call,) = started
    assert call.command == [sys.executable, "app.py"] and "app.py" in call.files and "mine.yaml" in call.files
    expected = {
        "SAFEVLM_MODEL": str(saved_model.resolve()),
        "SAFEVLM_POLICIES": "strict,mine.yaml",
        "SAFEVLM_COMPARE": "false",
        "SAFEVLM_TITLE": "Ours",
        "GRADIO_SERVER_PORT": "7999",
        "GRADIO_SERVER_NAME": "127.0.0.1",
    }
    assert expected.items() <= call.env.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "lenient"], "presets default, paper, strict, off; got 'lenient'"),
        (["--policies", "none.yaml"], "none.yaml"),
        (["--policies", "{folder}/off.yaml"], "off.yaml': visitors would take the file for the preset"),
        (["--example", "none.png", "What?"], "'none.png' does not exist"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(started, capsys, tmp_path, arguments, message):
    (tmp_path / "off.yaml").write_text("risk_threshold: 0.1\n")
    assert main(["space", "--model", MODEL, *(argument.format(folder=tmp_path) for argument in arguments)]) == 1
    assert message in capsys.readouterr().err and started == []


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(space, "find_spec", lambda name: None)
    assert main(["space", "--model", MODEL]) == 1
    assert "pip install 'safevlm[space]'" in capsys.readouterr().err


APP = """
import os, pathlib, time

pathlib.Path("pid").write_text(str(os.getpid()))
time.sleep(60)
"""
# The packages' own imports, seconds of them, are left out.
SERVE = """
import sys, types
from pathlib import Path

commands = Path(sys.argv[2])
places = {"safevlm": commands.parents[1], "safevlm.trainer": commands.parent, "safevlm.trainer.commands": commands}
for name, place in places.items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(place)]
from safevlm.trainer.commands.space import serve

serve(Path(sys.argv[1]), {"SAFEVLM_MODEL": "me/model"}, "127.0.0.1", 0)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_the_page_ends_with_the_command_without_a_word(tmp_path, number):
    pytest.importorskip("gradio", reason="gradio is not installed; pip install 'safevlm[space]'")
    (tmp_path / "app.py").write_text(APP)
    arguments = [sys.executable, "-c", SERVE, str(tmp_path), str(Path(space.__file__).parent)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, process_group=0) as command:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
            assert command.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        page = int((tmp_path / "pid").read_text())
        os.killpg(command.pid, number)  # as a terminal does
        assert command.wait(timeout=30) == 0 and command.stderr.read() == b""
    with pytest.raises(ProcessLookupError):
        os.kill(page, 0)


@pytest.mark.parametrize("policies, message", [(" ,", "at least one policy"), ("strikt", "--policies 'strikt,': ")])
def test_policies_that_do_not_exist_are_told_before_anything_starts(policies, message, capsys):
    assert main(["space", "--model", MODEL, "--policies", policies + ","]) == 1
    assert message in capsys.readouterr().err


# -- push


@pytest.fixture
def hub(monkeypatch):
    """A loopback Hub with the model on it. The Space's variables are recorded in `hub.variables`."""
    with taken_for_the_hub(monkeypatch) as running:
        running.variables = {}
        monkeypatch.setattr(
            HfApi, "add_space_variable", lambda self, repo, key, value: running.variables.update({key: value})
        )
        running.add(MODEL, private=True)
        yield running


def test_a_push_makes_a_private_space_whose_model_is_pinned(hub, example, capsys):
    assert main(["space", "--model", MODEL, "--push", "me/demo", "--example", str(example), "What?"]) == 0
    printed = json.loads(capsys.readouterr().out)
    pushed = hub.repo("spaces/me/demo")
    assert pushed.private and {"app.py", "README.md", "pictures.py", "examples/0.jpg"} <= set(pushed.files)
    assert pushed.files["style.css"] == (Path(space.__file__).parents[2] / "model_card/space/style.css").read_bytes()
    assert hub.created[-1]["sdk"] == "gradio"
    assert hub.variables == {
        "SAFEVLM_MODEL": MODEL,
        "SAFEVLM_REVISION": HfApi(endpoint=hub.url).model_info(MODEL).sha,
        "SAFEVLM_POLICIES": "default,strict",
        "SAFEVLM_COMPARE": "true",
    }
    assert printed["variables"] == hub.variables and "demo" in printed["space"]


def test_a_second_push_updates_the_space(hub):
    for _ in range(2):
        assert main(["space", "--model", MODEL, "--push", "me/demo", "--revision", "main"]) == 0
    assert "app.py" in hub.repo("spaces/me/demo").files
    assert hub.variables["SAFEVLM_REVISION"] == HfApi(endpoint=hub.url).model_info(MODEL).sha


def test_a_folder_cannot_be_the_model_of_a_space(hub, saved_model, capsys):
    assert main(["space", "--model", str(saved_model), "--push", "me/demo"]) == 1
    assert "safevlm push" in capsys.readouterr().err and "spaces/me/demo" not in hub.repos


def test_a_model_that_is_not_on_the_hub_is_told_before_anything_is_made(hub, capsys):
    assert main(["space", "--model", "me/none", "--push", "me/demo"]) == 1
    assert "me/none" in capsys.readouterr().err and "spaces/me/demo" not in hub.repos
