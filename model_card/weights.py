"""Prepares safetensors files for the Hub: checks them, splits them into shards, or extracts the safety modules.

Works tensor by tensor, so that a model may be larger than memory.
"""

import json
from pathlib import Path

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from safevlm.files import replace_json

WEIGHTS = "model*.safetensors"
INDEX = "model.safetensors.index.json"


def check_weights(folder: Path, names: list[str]):
    """
    Raises:
        `ValueError`: A file is missing, incomplete or not in safetensors format.
    """
    if not names:
        raise ValueError(f"{str(folder)!r} holds no weights ({WEIGHTS}); push a folder that `save_pretrained` wrote.")
    for name in names:
        try:
            with safe_open(folder / name, framework="numpy"):  # reads the header only, without torch
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{folder / name} is not a complete safetensors file: {error}. Save the model again."
            ) from None
    if (folder / INDEX).is_file():
        indexed = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        if odd := sorted(indexed ^ set(names)):
            raise ValueError(f"{folder / INDEX} and the weight files do not fit each other: {', '.join(odd)}.")


def resharded(folder: Path, names: list[str], max_shard_size: str | int, scratch: Path) -> dict[str, Path]:
    """
    The weight files to push, and their index: name in the repository -> file. None is larger than `max_shard_size`,
    unless a single tensor is.

    Files that are small enough are pushed as they are. The same weights always give the same shards, so that a
    repeated push finds on the Hub what an interrupted one has sent.

    Args:
        folder (`Path`): Folder with the weight files.
        names (`list[str]`): Names of the weight files.
        max_shard_size (`str` or `int`): Such as `"5GB"`, or a number of bytes.
        scratch (`Path`): Folder for the shards.
    """
    limit = _bytes(max_shard_size)
    if all((folder / name).stat().st_size <= limit + _header(folder / name)[0] for name in names):
        return {name: folder / name for name in (*names, *([INDEX] if (folder / INDEX).is_file() else []))}
    file_of = {key: name for name in names for key in _sizes(folder / name)}
    plan = split_state_dict_into_shards_factory(
        {key: size for name in names for key, size in _sizes(folder / name).items()},
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    paths = {}
    from safetensors.torch import save_file  # loads torch, which checking does not need

    for shard, keys in plan.filename_to_tensors.items():
        tensors = {}
        for name in sorted({file_of[key] for key in keys}):
            with safe_open(folder / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in keys if file_of[key] == name}
        paths[shard] = scratch / shard
        save_file(tensors, paths[shard], metadata={"format": "pt"})
    if plan.is_sharded:
        paths[INDEX] = scratch / INDEX
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        replace_json(paths[INDEX], index, sort_keys=True)
    return paths


def extract_safety_modules(folder: Path, names: list[str], output: Path):
    """Writes the safety modules of a whole model's weight files to `output`, as `save_safety_adapter` would."""
    from safetensors.torch import save_file  # loads torch, which checking does not need

    tensors = {}
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            tensors |= {
                key.removeprefix("safety."): file.get_tensor(key) for key in file.keys() if key.startswith("safety.")
            }
    if not tensors:
        raise ValueError(f"{str(folder)!r} holds no safety weights; push a folder of a trained SafeVLM.")
    save_file(tensors, output, metadata={"format": "pt"})


def _header(path: Path) -> tuple[int, dict]:
    """The length of a file's header in bytes, and the header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length, json.loads(file.read(length))


def _sizes(path: Path) -> dict[str, int]:
    """Tensor -> size in bytes."""
    entries = _header(path)[1]
    entries.pop("__metadata__", None)
    return {key: entry["data_offsets"][1] - entry["data_offsets"][0] for key, entry in entries.items()}


def _bytes(size: str | int) -> int:
    from transformers.utils.hub import convert_file_size_to_int

    try:
        limit = convert_file_size_to_int(size)
    except ValueError:
        limit = 0
    if limit < 1:
        raise ValueError(f"`max_shard_size` must be a size such as '5GB' or '500MB', got {size!r}.")
    return limit
