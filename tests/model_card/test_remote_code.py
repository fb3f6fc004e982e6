"""`safevlm code`: which Python files a model would run, and whether they are safevlm's, without running any."""

import json
import re
import shutil
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from safevlm import __version__
from safevlm.model_card.code_review import read_code
from safevlm.trainer.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))
from loopback import taken_for_the_hub

ALL_SAME = re.compile(rf"(\d+) files, (\d+) lines: all as in safevlm {re.escape(__version__)}")
RUNS = "import pathlib\npathlib.Path(__file__).with_name('it_ran').touch()\n"


@pytest.fixture
def saved(model_folders, tmp_path):
    """A copy of a saved model that a test may change."""
    return Path(shutil.copytree(model_folders / "safe", tmp_path / "model"))


@pytest.fixture
def code(capsys):
    """`code("FOLDER", ...)`: exit code, lines of standard output, and standard error."""

    def call(*arguments):
        exit_code = main(["code", *map(str, arguments)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return exit_code, captured.out.splitlines(), captured.err

    return call


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def line_of(name, lines):
    (line,) = (line for line in lines if re.search(rf"\s{re.escape(name)}(\s|$)", line[:80]))
    return line


def append(path, text):
    path.write_bytes(path.read_bytes() + text.encode())


def test_a_model_without_code_is_not_called_safevlm_s(tmp_path, code):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    exit_code, lines, err = code(tmp_path)
    assert (exit_code, err) == (0, "")
    assert lines == ["The model brings no code: there is nothing to compare, and nothing of it would run"]


def test_a_saved_model_s_files_are_all_safevlm_s(saved, code):
    exit_code, lines, err = code(saved)
    files = {path.name: path.read_bytes() for path in saved.glob("*.py")}
    assert exit_code == 0 and err == "" and len(lines) == len(files) + 1
    total = 0
    for name, content in files.items():
        status, count, digest, *_ = line_of(name, lines).split()
        assert (status, digest) == ("same", sha256(content).hexdigest()[:12])
        assert int(count) == len(content.decode().splitlines())
        total += int(count)
    assert ALL_SAME.fullmatch(lines[-1]).groups() == (str(len(files)), str(total))
    assert "Configuration of a SafeVLM: the base model's" in line_of("configuration_safevlm.py", lines)
    assert max(map(len, lines)) <= 119


def test_a_changed_file_and_what_it_uses_are_shown_last(saved, code):
    append(saved / "pipeline_safevlm.py", "import requests, subprocess as sp\nfrom os import system as s\n")
    append(saved / "pipeline_safevlm.py", "s('x')\nsp.run(eval('1'))\n")
    exit_code, lines, _ = code(saved)
    assert exit_code == 1 and lines[-4].startswith("differs ")
    assert lines[-4] == line_of("pipeline_safevlm.py", lines)
    assert lines[-3:-1] == ["    imports: requests", "    calls: eval, os.system, requests, subprocess.run"]
    total = len(list(saved.glob("*.py")))
    advice = "read it before you trust it (--diff shows how)"
    assert lines[-1] == f"1 of {total} files is not safevlm {__version__}'s: {advice}"


def test_one_other_byte_makes_a_difference(saved, code):
    content = (saved / "configuration_safevlm.py").read_bytes()
    (saved / "configuration_safevlm.py").write_bytes(content.replace(b"5.23", b"5.24", 1))
    exit_code, lines, _ = code(saved)
    assert exit_code == 1 and line_of("configuration_safevlm.py", lines).startswith("differs ")


def test_the_diff_goes_from_safevlm_s_file_to_the_model_s(saved, code):
    append(saved / "pipeline_safevlm.py", "x = 1\n")
    configuration = saved / "configuration_safevlm.py"
    configuration.write_bytes(configuration.read_bytes().replace(b"\n", b"\r\n"))
    append(saved / "pipeline_safevlm.py", "from .helper import x\n")
    (saved / "helper.py").write_text("hidden = 1\n")
    exit_code, lines, _ = code(saved, "--diff")
    start = lines.index("--- safevlm/pipeline_safevlm.py")
    assert lines[start + 1] == "+++ model/pipeline_safevlm.py"
    assert exit_code == 1 and "+x = 1" in lines and "-x = 1" not in lines
    assert "+check_installed()\\r" in lines and "-check_installed()" in lines  # the only difference can be seen
    assert line_of("helper.py", lines).startswith("unknown ") and "+hidden = 1" not in lines
    assert lines[-1].startswith("3 of ") and "are not safevlm" in lines[-1]
    assert "+x = 1" not in code(saved)[1]


def test_imports_are_followed_and_files_that_nothing_names_are_not_counted(saved, code):
    append(saved / "configuration_safevlm.py", "from .one import x\n")
    (saved / "one.py").write_text("from .two import x\n")
    (saved / "two.py").write_text("from .one import x\n")
    (saved / "train.py").write_text("eval('1')\n")
    (saved / "tools").mkdir()
    (saved / "tools" / "more.py").write_text("")
    exit_code, lines, _ = code(saved)
    assert exit_code == 1 and [line_of(f"{n}.py", lines).split()[0] for n in ("one", "two")] == ["unknown"] * 2
    assert {"not loaded train.py", "not loaded tools/more.py"} <= set(lines)
    assert re.match(rf"3 of {len(list(saved.glob('*.py'))) - 1} files ", lines[-1])


def test_files_that_would_not_run_are_harmless(saved, code):
    (saved / "train.py").write_text("eval('1')\n")
    exit_code, lines, _ = code(saved)
    assert exit_code == 0 and "not loaded train.py" in lines and ALL_SAME.fullmatch(lines[-1])


@pytest.mark.parametrize(
    "file, fields",
    [
        ("config.json", {"auto_map": {"AutoModel": "extra.Model"}}),
        ("config.json", {"custom_pipelines": {"image-text-to-text": {"impl": "extra.Pipeline"}}}),
        ("config.5.0.json", {"auto_map": {"AutoConfig": "extra.Config"}}),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "extra.Processor"}}),
        ("processor_config.json", {"image_processor": {"auto_map": {"AutoImageProcessor": {"pil": "extra.I"}}}}),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "extra.ImageProcessor"}}),
        ("video_preprocessor_config.json", {"auto_map": {"AutoVideoProcessor": "extra.VideoProcessor"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "extra.Tokenizer"]}}),
        ("tokenizer_config.json", {"auto_map": ["extra.Tokenizer", None]}),
    ],
)
def test_code_is_found_wherever_transformers_looks_for_it(saved, code, file, fields):
    if not (saved / file).is_file():
        (saved / file).write_text("{}")
    edit(saved / file, **fields)
    (saved / "extra.py").write_text(RUNS)
    exit_code, lines, _ = code(saved, "--diff")
    assert exit_code == 1 and line_of("extra.py", lines).startswith("unknown ")
    assert not (saved / "it_ran").exists() and "extra" not in sys.modules


@pytest.mark.parametrize("reference", ["sub/extra.Model", "my-extra.Model"])
def test_code_in_a_file_of_another_kind_of_name_counts(saved, code, reference):
    edit(saved / "config.json", auto_map={"AutoModel": reference})
    path = saved / f"{reference.split('.')[0]}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text("from .helper import x\n")
    path.with_name("helper.py").write_text("")
    exit_code, lines, _ = code(saved)
    assert exit_code == 1 and lines[-1].startswith("2 of ")
    assert not any(line.startswith(("elsewhere", "not loaded " + path.name)) for line in lines)


def test_a_generate_that_takes_the_place_of_the_model_s_counts(saved, code):
    (saved / "custom_generate").mkdir()
    (saved / "custom_generate" / "generate.py").write_text(RUNS)
    exit_code, lines, _ = code(saved)
    assert exit_code == 1 and line_of("custom_generate/generate.py", lines).startswith("unknown ")


@pytest.mark.parametrize(
    "reference", ["other/repo--modeling_safevlm.SafeVlmForConditionalGeneration", "gone.Model", "/tmp/extra.Model"]
)
def test_code_of_another_place_is_reported(saved, code, reference):
    auto_map = json.loads((saved / "config.json").read_text())["auto_map"]
    edit(saved / "config.json", auto_map={**auto_map, "AutoProcessor": reference})
    (saved / "other").mkdir()
    shutil.copy(saved / "modeling_safevlm.py", saved / "other" / "repo--modeling_safevlm.py")  # would not be loaded
    exit_code, lines, _ = code(saved)
    assert exit_code == 1 and f"elsewhere  {reference}" in lines
    assert "not in this folder" in lines[-1] and " files " not in lines[-1]


def test_the_base_of_an_adapter_is_reported(saved, code):
    (saved / "adapter_config.json").write_text('{"base_model_name_or_path": "other/repo"}')
    exit_code, lines, _ = code(saved)
    assert exit_code == 1 and "elsewhere  adapter_config.json: other/repo" in lines


def test_what_the_base_s_configuration_names_is_never_run(saved, code):
    base = json.loads((saved / "config.json").read_text())["base_config"]
    edit(saved / "config.json", base_config={**base, "auto_map": {"AutoModel": "other/repo--modeling.Model"}})
    assert code(saved)[0] == 0


def test_nothing_that_a_terminal_acts_on_is_printed(saved, code):
    append(saved / "configuration_safevlm.py", "from .helper import x  # \x1b[2K \u202e\n")
    (saved / "helper.py").write_text(f'"""Nice\x1b]0;title\x07 {"x" * 200}"""\nimport a\n')
    (saved / "evil\x1b[2J.py").write_text("")
    auto_map = json.loads((saved / "config.json").read_text())["auto_map"]
    edit(saved / "config.json", auto_map={**auto_map, "A": "other\x1b[2J/repo--x.Y"}, safevlm_version="9\x1b[2J")
    exit_code, lines, _ = code(saved, "--diff")
    assert exit_code == 1 and all(line.isprintable() for line in lines)
    assert "not loaded evil\\x1b[2J.py" in lines and "+from .helper import x  # \\x1b[2K \\u202e" in lines
    assert len(line_of("helper.py", lines)) == 119 and line_of("helper.py", lines).endswith("x…")


@pytest.mark.parametrize("version, said", [("0.0.9", True), (__version__, False), ("1 --index-url x", False)])
def test_the_release_to_compare_with_is_named(saved, code, version, said):
    edit(saved / "config.json", safevlm_version=version)
    assert code(saved)[0] == 0
    append(saved / "pipeline_safevlm.py", "x = 1\n")
    lines = code(saved)[1]
    assert ("pip install" in "".join(lines)) is said
    assert not said or lines[-1].endswith("by safevlm 0.0.9: to compare with that, pip install safevlm==0.0.9")


@pytest.mark.parametrize(
    "source, imports, calls",
    [
        ("import torch, transformers, json, numpy.linalg", ["numpy"], []),
        ("from urllib import request as r\nr.urlopen('x')", [], ["urllib.request.urlopen"]),
        ("import pickle", [], ["pickle"]),
        ("f = exec\nre.compile('x')\nmodel.eval()\nfrom .open import y", [], ["exec"]),
        ("__import__('os').system('x')", [], ["__import__"]),
        ("from os import *", [], ["os.*"]),
        ("import importlib as i\ni.import_module('x')", [], ["importlib.import_module"]),
        ("compile('1', '', 'eval')\nopen('x')\nimport ctypes, socket", [], ["compile", "ctypes", "open", "socket"]),
    ],
)
def test_imports_and_suspicious_uses_are_found_without_running(source, imports, calls):
    assert read_code(b'"""First.\n\nSecond."""\n' + source.encode()) == ("First.", imports, calls)


@pytest.mark.parametrize("source", [b"def", b"\x00", b"(" * 5000, b"x = '\\d'", b"# coding: nonsense\n"])
def test_source_that_is_no_python_is_no_error(source, recwarn):
    assert read_code(source)[1:] == ([], []) and not list(recwarn)


def test_a_hub_id_is_reviewed_without_its_weights(saved, code, monkeypatch):
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    with taken_for_the_hub(monkeypatch) as hub:
        repo = hub.add("me/m", files=files)
        repo.branches["bad"] = {**files, "pipeline_safevlm.py": b"import requests\n"}
        exit_code, lines, _ = code("me/m")
        assert exit_code == 0 and ALL_SAME.fullmatch(lines[-2])
        assert lines[-1] == f'Load what you read: revision="{repo.sha("main")}"'
        exit_code, lines, _ = code("me/m", "--revision", "bad")
        assert exit_code == 1 and line_of("pipeline_safevlm.py", lines).startswith("differs ")
        assert code("me/m", "--revision", repo.sha("bad"))[0] == 1
        requested = {path.rpartition("/")[2] for _, path in hub.requests if "/resolve/" in path}
        assert {"config.json", "modeling_safevlm.py"} <= requested
        assert requested <= {name for name in files if name.endswith((".py", ".json"))}
        for arguments, what in ((("me/gone",), "nor a model on the Hub"), (("me/m", "--revision", "v9"), "'v9'")):
            exit_code, lines, err = code(*arguments)
            assert exit_code == 1 and lines == [] and what in err and err.count("\n") == 1


def test_wrong_arguments_are_one_clear_line(saved, code, tmp_path):
    (tmp_path / "empty").mkdir()
    (saved / "configuration_safevlm.py").write_bytes(b"\xff")
    broken = Path(shutil.copytree(saved, tmp_path / "broken"))
    (broken / "config.json").write_text("{")
    for arguments, what in (
        ((tmp_path / "empty",), "holds no config.json"),
        ((tmp_path / "no such\tfolder",), "is neither a folder nor a model"),
        ((saved, "--revision", "main"), "is a folder; leave it out"),
        ((saved,), "configuration_safevlm.py' is not UTF-8 text"),
        ((broken,), "config.json' is not valid JSON"),
    ):
        exit_code, lines, err = code(*arguments)
        assert exit_code == 1 and lines == [] and what in err and err.count("\n") == 1, err


def test_help_ends_with_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["code", "--help"])
    assert "Example:\n  safevlm code " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("policy", "says"), [("off", "it is off"), ("paper", "`forced_refusal` is false"), ("default", "")]
)
def test_a_weak_policy_is_told(saved, code, policy, says):
    edit(saved / "config.json", safety_policy=policy)
    told = [line for line in code(saved)[1] if "own policy is weak" in line]
    assert len(told) == bool(says) and all(says in line for line in told)


def test_a_policy_that_names_a_file_is_told(saved, code):
    edit(saved / "config.json", safety_policy="/etc/policy.yaml")
    assert any("own policy is weak: it is not valid" in line for line in code(saved)[1])
