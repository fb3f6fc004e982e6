"""Facts for the model card about the base model, the data and the training stages.

Their form is in `model_card/facts.py`; numbers are in `card_results.py`.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError

from safevlm.files import file_sha256, is_hub_id
from safevlm.model_card.facts import portable_word
from safevlm.safety_labels import SafetyLabels

from .data.mix_output import MANIFEST, MANIFEST_FORMAT, input_hashes
from .recipe import Recipe
from .stage.card_callback import read_measured
from .stage.training_args import TRAINABLE


def model_facts(model_name: str, base: dict, training: dict, results: list[dict]) -> dict:
    """All facts about a model after its training. It has the base's licence, until its publisher chooses one."""
    license = {"license": base["license"], "license_source": "that of the base model"} if base.get("license") else {}
    return {"model_name": model_name, "base_model": base, **license, "training": training, "results": results}


def base_facts(base: str | os.PathLike, config) -> dict:
    """Name, commit or file digests, and licence of a base model; `config` is its loaded configuration."""
    folder = Path(base)
    if not folder.is_dir():
        revision = getattr(config, "_commit_hash", None)
        return {"name": str(base), "revision": revision, "license": hub_license(str(base), revision)}
    return {
        "name": portable_word(str(folder)) if folder.is_absolute() else folder.resolve().name,
        "license": _license_of(folder / "README.md"),
        "files": {path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))},
    }


def hub_license(repo_id: str, revision: str | None = None, repo_type: str = "model") -> str | None:
    """The licence on the card of a repository; `None` if it states none, or the card cannot be downloaded."""
    try:
        return _license_of(Path(hf_hub_download(repo_id, "README.md", revision=revision, repo_type=repo_type)))
    except (EntryNotFoundError, HfHubHTTPError, HTTPError, OSError, ValueError):
        return None


def _license_of(card: Path) -> str | None:
    """The licence in the metadata of a card. Others wrote it, so anything but text counts as unknown."""
    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        data = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (UnicodeDecodeError, yaml.YAMLError, IndexError):
        return None
    if not isinstance(data, dict):
        return None
    name = data.get("license_name") if data.get("license") == "other" else data.get("license")
    return name if isinstance(name, str) else None


def data_facts(paths: Sequence[str | os.PathLike], revision: str | None = None) -> dict:
    """
    Where the training data come from: `data` has each file with its SHA-256 and each Hub data set with its revision,
    `mixes` the sources of each file that `safevlm data mix` made.
    """
    data, mixes = [], []
    for path in map(Path, paths):
        if not path.exists() and is_hub_id(str(path)):
            license = hub_license(str(path), revision, "dataset")
            data.append({"name": str(path), "sha256": None, "revision": revision, "license": license})
            continue
        for name, digest in input_hashes(path.name, path.resolve().parent).items():
            data.append({"name": name, "sha256": digest})
        if path.is_file() and (manifest := _mix_manifest(path, data[-1]["sha256"])) is not None:
            mixes.append({"file": path.name, "seed": manifest["recipe"]["seed"], "sources": manifest["sources"]})
    return {"data": data, "mixes": mixes}


def _mix_manifest(path: Path, sha256: str) -> dict | None:
    """The manifest of the mix that made a file with this digest; `None` if no mix made it."""
    if not (path.parent / MANIFEST).is_file():
        return None
    manifest = json.loads((path.parent / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        return None
    made = any(split["sha256"] == sha256 for split in manifest["splits"].values())
    return manifest if made else None


def row_counts(rows, labels: SafetyLabels) -> dict:
    """Rows per category and per level, in the order of the labels."""
    categories, levels = Counter(row.category for row in rows), Counter(row.level for row in rows)
    return {
        "categories": {name: categories[i] for i, name in enumerate(labels.category_names)},
        "levels": {name: levels[i] for i, name in enumerate(labels.level_names)},
    }


def stage_facts(output_dir: str | os.PathLike, recipe: Recipe) -> list[dict]:
    """Hyper-parameters and measurements of each stage that `run_schedule` trained in `output_dir`."""
    facts = []
    for folder, stage in zip(recipe.folders(output_dir), recipe.stages, strict=True):
        arguments = {"trainable": list(TRAINABLE[folder.stage]), **stage}
        for argument in ("safety_level_loss_coef", "safety_category_loss_coef"):
            if argument in recipe.safety:
                arguments.setdefault(argument, recipe.safety[argument])
        arguments = json.loads(json.dumps(arguments, default=str))
        facts.append({"stage": folder.stage, "arguments": arguments, "measured": read_measured(folder.path)})
    return facts
