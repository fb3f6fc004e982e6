"""The Python code that a saved model carries: what `trust_remote_code=True` would run, compared with safevlm's own.

Files are read and parsed, never imported.
"""

import ast
import json
import re
import sys
import warnings
from dataclasses import dataclass, fields
from difflib import unified_diff
from importlib.util import find_spec
from pathlib import Path
from posixpath import dirname, join, normpath

from safevlm.safety_labels import SafetyLabels
from safevlm.safety_policy import SafetyPolicy

FOLDERS = [Path(find_spec(package).origin).parent for package in ("safevlm", "safevlm.processing")]
# Of a model, of another model that config.json points to by version, of the processor and its parts, of the tokenizer.
CONFIGS = ("config*.json", "*processor_config.json", "tokenizer_config.json")
GENERATE = "custom_generate/generate.py"
KNOWN = {*sys.stdlib_module_names, "torch", "transformers"}
SUSPICIOUS = re.compile(
    r"eval|exec|compile|__import__|__builtins__|open|os\.(system|popen|exec\w*|spawn\w*|posix_spawn\w*|\*)|torch\.load"
    r"|(subprocess|socket|urllib|http|requests|ctypes|pickle|marshal|importlib|runpy|builtins|torch\.hub)(\.[\w.*]+)?"
)


@dataclass
class CodeFile:
    """
    Args:
        name (`str`): Path in the model's folder.
        content (`bytes`)
        released (`bytes`, *optional*): The installed safevlm's file of that name, if it has one.
    """

    name: str
    content: bytes
    released: bytes | None

    @property
    def status(self) -> str:
        if self.released is None:
            return "unknown"
        return "same" if self.content == self.released else "differs"

    def diff(self) -> list[str]:
        """From safevlm's file to the model's, as lines that are safe to print."""
        # At "\n" alone: other line ends are shown, or a file that differs in them only would seem not to.
        old, new = (content.decode().split("\n") for content in (self.released, self.content))
        lines = unified_diff(old, new, f"safevlm/{self.name}", f"model/{self.name}", lineterm="")
        return [printable(line) for line in lines]


@dataclass
class Review:
    """
    Args:
        files (`list[CodeFile]`): Files that would run; those that are safevlm's come first.
        elsewhere (`list[str]`): What names code that is not in the folder: another repository's, or nobody's.
        not_loaded (`list[str]`): Python files that would not run.
        saved_by (`str`, *optional*): The release of safevlm that wrote the configuration.
        weaknesses (`list[str]`): In which ways the model's policy is milder than the preset "default".
    """

    files: list[CodeFile]
    elsewhere: list[str]
    not_loaded: list[str]
    saved_by: str | None
    weaknesses: list[str]

    @property
    def others(self) -> list[CodeFile]:
        return [file for file in self.files if file.status != "same"]

    @property
    def all_same(self) -> bool:
        return not self.others and not self.elsewhere


def code_folder(model: str, revision: str | None = None) -> Path:
    """
    The folder of a model's code and configurations; of a Hub id these are downloaded, without weights.

    Raises:
        `ValueError`: There is no such model or revision.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if Path(model).is_dir():
        if revision is not None:
            raise ValueError(f"--revision {revision!r} is for Hub ids, and {model!r} is a folder; leave it out.")
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=["*.py", "*config*.json"]))
    except RevisionNotFoundError:
        raise ValueError(f"--revision {revision!r}: {model!r} has none of that name; see its commits.") from None
    except (HFValidationError, RepositoryNotFoundError):
        raise ValueError(
            f"MODEL {model!r} is no folder, and no model on the Hub that you may see; check the name, or log in with "
            f"`hf auth login`."
        ) from None
    except LocalEntryNotFoundError:
        raise ValueError(
            f"MODEL {model!r} is no folder here, and not in the cache of the Hub's models, and the Hub cannot be "
            "reached."
        ) from None


def review_code(folder: Path) -> Review:
    """Compares the code in a model's folder with the installed safevlm's."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"MODEL {str(folder)!r} holds no config.json; name a saved model's folder or Hub id.")
    named = named_code(folder)
    if (folder / GENERATE).is_file():  # transformers puts it in the place of `generate`, unasked
        named.append(GENERATE)
    names, elsewhere = remote_code(folder, named)
    if (folder / "adapter_config.json").is_file():  # with PEFT, AutoModel loads this one instead, code included
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        elsewhere.append(f"adapter_config.json: {base}")
    contents = {name: (folder / name).read_bytes() for name in sorted(names)}
    files = [CodeFile(name, content, _released(name, content)) for name, content in contents.items()]
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    return Review(
        sorted(files, key=lambda file: file.status != "same"),
        elsewhere,
        [name for name in found if name not in names],
        read_json(folder / "config.json").get("safevlm_version"),
        _weaknesses(read_json(folder / "config.json")),
    )


def named_code(folder: Path, adapter: bool = False) -> list[str]:
    """
    What the configurations in a model's folder name: `module.Class`, of another repository `other/repo--module.Class`.

    Args:
        adapter (`bool`): The folder holds an adapter; the classes of its model and pipeline come from the package.
    """
    named = []
    for path in sorted(path for pattern in CONFIGS for path in folder.glob(pattern)):
        content = read_json(path)
        # A processor's parts name code, too. The base of a SafeVLM is of transformers' own classes, whatever it names.
        parts = [part for name, part in content.items() if isinstance(part, dict) and name != "base_config"]
        for part in (content, *parts):
            classes = part.get("auto_map") or {}
            classes = classes if isinstance(classes, dict) else {"AutoTokenizer": classes}
            named += [value for auto, value in classes.items() if not (adapter and auto.startswith("AutoModel"))]
            pipelines = () if adapter else _values(part.get("custom_pipelines"))
            named += [pipeline.get("impl") for pipeline in pipelines if isinstance(pipeline, dict)]
    return sorted(set(_strings(named)))


def remote_code(folder: Path, named: list[str]) -> tuple[set[str], list[str]]:
    """
    The Python files that `trust_remote_code=True` would run for the code that is `named`, imports included, and what
    names code that is not in the folder.

    Raises:
        `ValueError`: A file is no UTF-8 text.
    """
    from transformers.dynamic_module_utils import get_relative_imports

    todo = [(reference, f"{reference.split('.')[0]}.py") for reference in named]
    files, elsewhere = set(), []
    for reference, name in todo:  # which grows
        inside = "--" not in reference and re.fullmatch(r"[\w./-]+", name) and not name.startswith(("/", "../"))
        if not inside or not (folder / name).is_file():
            elsewhere.append(reference)
        elif name not in files:
            files.add(name)
            try:
                modules = sorted(get_relative_imports(folder / name))
            except UnicodeDecodeError:
                raise ValueError(f"{str(folder / name)!r} is no UTF-8 text, as code must be; replace it.") from None
            todo += [(f"{name}: .{module}", normpath(join(dirname(name), f"{module}.py"))) for module in modules]
    return files, elsewhere


def read_code(content: bytes) -> tuple[str, list[str], list[str]]:
    """
    Of Python source: the first line of its docstring, the packages it imports that are not `KNOWN`, and what it uses
    of `SUSPICIOUS`. A hint where to look first, no proof: code can hide what it does.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # they would quote the source
            tree = ast.parse(content)
        names, used = {}, set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
                names |= {alias.asname: alias.name for alias in node.names if alias.asname}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                used |= {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        packages = {name.split(".")[0] for name in used} - KNOWN
        for node in ast.walk(tree):
            if isinstance(node, ast.Name | ast.Attribute):
                root, dot, rest = ast.unparse(node).partition(".")
                used.add(names.get(root, root) + dot + rest)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "(no valid Python)", [], []
    found = {name for name in used if SUSPICIOUS.fullmatch(name)}
    calls = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    return (ast.get_docstring(tree) or "").partition("\n")[0], sorted(packages), sorted(calls)


def printable(text: str) -> str:
    """Text without anything that a terminal acts on, or does not show: it stands there as an escape."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object.")
    return content


def _released(name: str, content: bytes) -> bytes | None:
    paths = [folder / name for folder in FOLDERS if "/" not in name and (folder / name).is_file()]
    found = [path.read_bytes() for path in paths]
    return content if content in found else next(iter(found), None)


def _weaknesses(config: dict) -> list[str]:
    try:
        labels = SafetyLabels(**{f.name: config[f.name] for f in fields(SafetyLabels) if config.get(f.name)})
        policy = SafetyPolicy.from_value(config.get("safety_policy", "default"), files=False)
        return policy.weaknesses(labels)
    except (ValueError, TypeError) as error:
        return [f"it is none: {error}"]


def _values(value) -> list:
    return [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []


def _strings(value) -> list[str]:
    """All strings in nested lists and dicts; a tokenizer has one class for each of two kinds, or `None`."""
    return [value] if isinstance(value, str) else [string for one in _values(value) for string in _strings(one)]
