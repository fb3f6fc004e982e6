"""`import safevlm` is cheap and registers everything; a model's remote code can do little but compute."""

import ast
import importlib.metadata
import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import safevlm
from safevlm import processing

HEAVY = ["datasets", "peft", "gradio", "sklearn", "matplotlib", "bitsandbytes", "pandas", "safevlm.trainer"]

# Part of the package only. All other files are saved with a model, flat in one folder.
PACKAGE_ONLY = {
    *("__init__.py", "__main__.py", "registration.py"),
    *("from_base.py", "safety_adapter.py", "adapter_files.py", "files.py", "policy_file.py"),
}
REMOTE_CODE = [
    path
    for package in (safevlm, processing)
    for path in sorted(Path(package.__file__).parent.glob("*.py"))
    if path.name not in PACKAGE_ONLY
]
# Nothing that opens connections, starts processes or unpickles. Only pictures.py downloads, with transformers' own
# client, when the caller names a picture by its web address.
STANDARD_LIBRARY = {
    *("base64", "binascii", "bisect", "collections", "contextlib", "copy", "dataclasses", "functools", "hashlib"),
    *("inspect", "io", "itertools", "json", "math", "os", "pathlib", "re", "secrets", "stat"),
    *("threading", "typing", "unicodedata"),
}
OS = {"os.PathLike", "os.fspath", "os.stat"}  # beside `os.path`
TORCH = {"torch", "torch.nn", "torch.nn.functional", "torch.nn.utils.rnn"}
PILLOW = {"PIL"}  # every vision-language model needs it
# Besides transformers: packages that it requires.
REQUIRED_BY_TRANSFORMERS = {"numpy": "numpy", "yaml": "pyyaml"}
FORBIDDEN = {"eval", "exec", "compile", "__import__", "open", "torch.load", "torch.hub"}


@pytest.fixture(scope="module")
def loaded():
    """Names of the modules that `import safevlm` loads on top of those of its transformers base classes."""
    code = (
        "import json, sys; from transformers import AutoProcessor, GenerationMixin, ImageTextToTextPipeline; "
        "before = set(sys.modules); import safevlm; print(json.dumps(list(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", HEAVY)
def test_import_loads_no(loaded, name):
    assert "safevlm.configuration_safevlm" in loaded and name not in loaded


def test_import_registers_the_classes_with_the_auto_classes():
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

    assert type(AutoConfig.for_model("safevlm")) is safevlm.SafeVlmConfig
    for auto in (AutoModel, AutoModelForImageTextToText):
        assert auto._model_mapping[safevlm.SafeVlmConfig] is safevlm.SafeVlmForConditionalGeneration


@pytest.mark.parametrize("modules", ["safevlm.trainer.schedule, transformers.trainer", "safevlm.trainer.evaluation"])
def test_training_imports_bitsandbytes_only_to_quantise(modules):
    """peft, which transformers' Trainer imports, would import it, and importing bitsandbytes writes to stderr."""
    code = (
        f"import sys, safevlm.trainer, {modules}, peft; assert 'bitsandbytes' not in sys.modules; "
        "from peft.import_utils import is_bnb_4bit_available; assert is_bnb_4bit_available()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lora_on_a_model_that_is_not_quantised_imports_no_bitsandbytes():
    code = (
        "import sys; from safevlm import SafeVlmProcessor; from safevlm.trainer import SafeVlmTrainingArguments as A; "
        "from safevlm.trainer.stage.lora import add_lora; from tiny import safe_model, tiny_llava, tiny_processor; "
        "model = safe_model(tiny_llava(), SafeVlmProcessor.from_base(tiny_processor())); "
        "add_lora(model, A(output_dir='out', stage='joint_finetuning', lora_r=2, use_cpu=True)).merge_and_unload(); "
        "assert 'bitsandbytes' not in sys.modules"
    )
    path = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}); {code}"], check=True)


def test_everything_public_is_there():
    assert safevlm.__all__ == sorted(safevlm.__all__)
    assert all(hasattr(safevlm, name) for name in safevlm.__all__)


# -- the code that a model carries -----------------------------------------------------------------------------------


def may_import(module: str) -> bool:
    top = module.split(".")[0]
    return (
        top in STANDARD_LIBRARY
        or module in TORCH
        or top == "transformers"
        or top in REQUIRED_BY_TRANSFORMERS
        or top in PILLOW
    )


def problems(code: str) -> list[str]:
    """Everything in a file of remote code that is not allowed there."""
    violations, siblings = [], set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            violations += [f"import {name.name}" for name in node.names if not may_import(name.name)]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = {f"{node.module}.{name.name}" for name in node.names}
            if not may_import(node.module) or names & FORBIDDEN:
                violations.append(f"from {node.module}")
        elif isinstance(node, ast.ImportFrom):
            siblings.add(node.module)
            if node.level > 1 or f"{node.module}.py" not in {path.name for path in REMOTE_CODE}:
                violations.append(f"from {'.' * node.level}{node.module or ''}")  # saving would not find that file
        elif isinstance(node, (ast.Name, ast.Attribute)):
            name = ast.unparse(node)
            if name in FORBIDDEN or (name.startswith("os.") and not name.startswith("os.path") and name not in OS):
                violations.append(name)
    # transformers finds the files to save with a regular expression, which also matches lines of docstrings.
    lines = re.findall(r"^\s*(?:from|import)\s+\.(\S+)", code, re.MULTILINE)
    return violations + [
        f"a text that reads as an import of .{line}" for line in lines if line.lstrip(".") not in siblings
    ]


@pytest.mark.parametrize("path", REMOTE_CODE, ids=lambda path: path.name)
def test_remote_code_imports_and_calls_only_what_is_allowed(path):
    assert problems(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "code",
    [
        "import bitsandbytes",
        "import os, subprocess",
        "from urllib.request import urlopen",
        "from safevlm.safety_modules import IGNORE_INDEX",
        "from ..processing_safevlm import SafeVlmProcessor",
        "from .nowhere import name",
        "from torch import load",
        "from torch.utils.cpp_extension import load_inline",
        "def f():\n    import pickle",
        "try:\n    import requests\nexcept ImportError:\n    requests = None",
        "value = eval('1')",
        "run = exec",
        "torch.load('weights.pt')",
        "os.system('ls')",
        "'''As in\nfrom .losses import IGNORE_INDEX\n'''",
    ],
)
def test_what_is_not_allowed_is_found(code):
    assert len(problems(code)) == 1


def test_importing_a_module_from_the_package_is_found():
    assert "from ." in problems("from . import losses")


def test_packages_beside_torch_and_transformers_come_with_transformers():
    required = [line for line in importlib.metadata.requires("transformers") if "extra ==" not in line]
    names = {re.match(r"[\w-]+", line)[0].lower() for line in required}
    assert set(REQUIRED_BY_TRANSFORMERS.values()) <= names


def test_no_two_files_of_remote_code_have_the_same_name():
    names = [path.name for path in REMOTE_CODE]
    assert len(names) == len(set(names))


# -- the size of that code: a reviewer reads all of it ---------------------------------------------------------------

# Bars, not goals: whoever raises one says in the CHANGELOG what it pays for.
MAX_FILES, MAX_LINES, MAX_CODE_LINES = 19, 4300, 2660
# The five files that decide what a model answers, in the order to read them (modeling_safevlm/README.md).
REVIEWERS_PATH = (
    *("safety_modules.py", "safety_verdict.py", "safety_policy.py"),
    *("modeling_safevlm.py", "generation_safevlm.py"),
)
MAX_PATH_LINES = 1570


NOT_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}


def num_code_lines(code: str) -> int:
    """Lines of code, without docstrings, comments and blank lines."""
    documented, lines = set(), set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            documented.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def test_lines_of_code_are_counted_without_docstrings_comments_and_blank_lines():
    code = '"""Two\nlines."""\n\n# why\nx = (\n    1,\n)\n\n\ndef f():\n    """Doc."""\n    return x  # here\n'
    assert num_code_lines(code) == 5


def test_remote_code_stays_small_enough_to_review():
    texts = [path.read_text(encoding="utf-8") for path in REMOTE_CODE]
    assert len(REMOTE_CODE) <= MAX_FILES, [path.name for path in REMOTE_CODE]
    assert sum(text.count("\n") for text in texts) <= MAX_LINES
    assert sum(map(num_code_lines, texts)) <= MAX_CODE_LINES


def test_the_reviewers_path_is_five_files_and_the_readme_names_them():
    folder = Path(safevlm.__file__).parent
    assert sum((folder / name).read_text(encoding="utf-8").count("\n") for name in REVIEWERS_PATH) <= MAX_PATH_LINES
    readme = (folder / "README.md").read_text(encoding="utf-8")
    names = [name for name in re.findall(r"^\d\. `(\w+\.py)`", readme, re.MULTILINE)]
    assert names == list(REVIEWERS_PATH)


def test_the_readme_names_every_file_of_remote_code():
    readme = (Path(safevlm.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in REMOTE_CODE if f"`{path.name}`" not in readme] == []
