"""Which Python files of a saved model `trust_remote_code=True` would run. They are read and parsed, never imported."""

import re
from pathlib import Path
from posixpath import dirname, join, normpath

from safevlm.files import read_json

# Configurations of the model, of another model that config.json refers to by version, of the processor and its parts,
# and of the tokenizer.
CONFIGS = ("config*.json", "*processor_config.json", "tokenizer_config.json")


def named_code(folder: Path, adapter: bool = False) -> list[str]:
    """
    The classes that the configurations in a model's folder refer to, as `module.Class`, or
    `other/repo--module.Class` for code of another repository.

    Args:
        folder (`Path`)
        adapter (`bool`): Whether the folder holds an adapter, whose model and pipeline classes come from the package.
    """
    named = []
    for path in sorted(path for pattern in CONFIGS for path in folder.glob(pattern)):
        content = read_json(path)
        # The parts of a processor can refer to code as well. The base model cannot: a SafeVLM loads it with
        # transformers' own classes, whatever its configuration says.
        parts = [part for name, part in content.items() if isinstance(part, dict) and name != "base_config"]
        for part in (content, *parts):
            classes = part.get("auto_map") or {}
            classes = classes if isinstance(classes, dict) else {"AutoTokenizer": classes}
            named += [value for auto, value in classes.items() if not (adapter and auto.startswith("AutoModel"))]
            pipelines = () if adapter else _values(part.get("custom_pipelines"))
            named += [pipeline.get("impl") for pipeline in pipelines if isinstance(pipeline, dict)]
    return sorted(set(_strings(named)))


def loaded_code(folder: Path, named: list[str]) -> tuple[set[str], list[str]]:
    """
    The Python files that loading the `named` classes would run, imports included, and the references to code that is
    not in the folder.

    Args:
        folder (`Path`)
        named (`list[str]`): From [`named_code`].

    Raises:
        `ValueError`: A file is not UTF-8 text.
    """
    from transformers.dynamic_module_utils import get_relative_imports  # loads transformers

    todo = [(reference, f"{reference.split('.')[0]}.py") for reference in named]
    files, elsewhere = set(), []
    for reference, name in todo:  # grows while it is read
        inside = "--" not in reference and re.fullmatch(r"[\w./-]+", name) and not name.startswith(("/", "../"))
        if not inside or not (folder / name).is_file():
            elsewhere.append(reference)
        elif name not in files:
            files.add(name)
            try:
                modules = sorted(get_relative_imports(folder / name))
            except UnicodeDecodeError:
                raise ValueError(f"{str(folder / name)!r} is not UTF-8 text, as code must be; replace it.") from None
            todo += [(f"{name}: .{module}", normpath(join(dirname(name), f"{module}.py"))) for module in modules]
    return files, elsewhere


def _values(value) -> list:
    return [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []


def _strings(value) -> list[str]:
    """All strings in nested lists and dicts. A tokenizer names two classes, either of which may be `None`."""
    return [value] if isinstance(value, str) else [string for item in _values(value) for string in _strings(item)]
