"""Compares the code that a saved model carries with the installed safevlm's. Nothing of it is imported or run."""

import ast
import re
import sys
import warnings
from dataclasses import dataclass, fields
from difflib import unified_diff
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from safevlm.files import read_json
from safevlm.safety_labels import SafetyLabels
from safevlm.safety_policy import SafetyPolicy

from .remote_code import loaded_code, named_code

# The installed safevlm's own files.
FOLDERS = [Path(find_spec(package).origin).parent for package in ("safevlm", "safevlm.processing")]
GENERATE = "custom_generate/generate.py"
KNOWN = {*sys.stdlib_module_names, "torch", "transformers"}
SUSPICIOUS = re.compile(
    r"eval|exec|compile|__import__|__builtins__|open|os\.(system|popen|exec\w*|spawn\w*|posix_spawn\w*|\*)|torch\.load"
    r"|(subprocess|socket|urllib|http|requests|ctypes|pickle|marshal|importlib|runpy|builtins|torch\.hub)(\.[\w.*]+)?"
)


@dataclass
class CodeFile:
    """
    A Python file that a model carries.

    Args:
        name (`str`): Path in the model's folder.
        content (`bytes`)
        released (`bytes`, *optional*): The content of the installed safevlm's file of that name.
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
        """How the model's file differs from safevlm's, in lines that are safe to print."""
        # Split at "\n" alone, so that differences in line ends are visible.
        old, new = (content.decode().split("\n") for content in (self.released, self.content))
        lines = unified_diff(old, new, f"safevlm/{self.name}", f"model/{self.name}", lineterm="")
        return [printable(line) for line in lines]


@dataclass
class Review:
    """
    What a model's code was found to be.

    Args:
        files (`list[CodeFile]`): Files that would run; those that equal safevlm's come first.
        elsewhere (`list[str]`): References to code that is not in the folder, such as another repository's.
        not_loaded (`list[str]`): Python files that would not run.
        saved_by (`str`, *optional*): The release of safevlm that wrote the configuration.
        weaknesses (`list[str]`): How the model's policy is weaker than the preset `"default"`.
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
    The folder with a model's code and configurations. For a Hub id they are downloaded, without weights.

    Raises:
        `ValueError`: There is no such model or revision.
    """
    if Path(model).is_dir():
        if revision is not None:
            raise ValueError(f"--revision {revision!r} is for Hub ids, and {model!r} is a folder; leave it out.")
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=["*.py", "*config*.json"]))
    except RevisionNotFoundError:
        raise ValueError(f"--revision {revision!r}: {model!r} has no such revision; see its commits.") from None
    except (HFValidationError, RepositoryNotFoundError):
        raise ValueError(
            f"MODEL {model!r} is neither a folder nor a model on the Hub that you can access; check the name, or log "
            f"in with `hf auth login`."
        ) from None
    except LocalEntryNotFoundError:
        raise ValueError(
            f"MODEL {model!r} is neither a folder nor in the cache of downloaded models, and the Hub cannot be "
            f"reached; check the name and the connection."
        ) from None


def review_code(folder: Path) -> Review:
    """
    Compares the code in a model's folder with the installed safevlm's.

    Raises:
        `ValueError`: The folder does not hold a model, or a file cannot be read.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"MODEL {str(folder)!r} holds no config.json; name a saved model's folder or Hub id.")
    named = named_code(folder)
    if (folder / GENERATE).is_file():  # transformers then uses it instead of the model's own `generate`
        named.append(GENERATE)
    names, elsewhere = loaded_code(folder, named)
    if (folder / "adapter_config.json").is_file():  # with PEFT, AutoModel loads that base instead, code included
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        elsewhere.append(f"adapter_config.json: {base}")
    contents = {name: (folder / name).read_bytes() for name in sorted(names)}
    files = [CodeFile(name, content, _released(name, content)) for name, content in contents.items()]
    present = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    config = read_json(folder / "config.json")
    return Review(
        files=sorted(files, key=lambda file: file.status != "same"),
        elsewhere=elsewhere,
        not_loaded=[name for name in present if name not in names],
        saved_by=config.get("safevlm_version"),
        weaknesses=_weaknesses(config),
    )


def read_code(content: bytes) -> tuple[str, list[str], list[str]]:
    """
    Summarises Python source: the first line of its docstring, the imported packages that are not `KNOWN`, and the
    names it uses that are `SUSPICIOUS`. This hints where to look first. It proves nothing: code can hide what it does.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # warnings would print parts of the source
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
    suspicious = {name for name in used if SUSPICIOUS.fullmatch(name)}
    calls = [name for name in suspicious if not any(other.startswith(f"{name}.") for other in suspicious)]
    return (ast.get_docstring(tree) or "").partition("\n")[0], sorted(packages), sorted(calls)


def printable(text: str) -> str:
    """Text whose control and invisible characters are escaped, so that a terminal cannot act on them."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _released(name: str, content: bytes) -> bytes | None:
    """safevlm's file of that name; if there are two, the one that equals `content`."""
    paths = [folder / name for folder in FOLDERS if "/" not in name and (folder / name).is_file()]
    candidates = [path.read_bytes() for path in paths]
    return content if content in candidates else next(iter(candidates), None)


def _weaknesses(config: dict) -> list[str]:
    try:
        labels = SafetyLabels(**{f.name: config[f.name] for f in fields(SafetyLabels) if config.get(f.name)})
        policy = SafetyPolicy.from_value(config.get("safety_policy", "default"), files=False)
        return policy.weaknesses(labels)
    except (ValueError, TypeError) as error:
        return [f"it is not valid: {error}"]
