"""Which files of a model's folder go to the Hub: an allow-list, checked before a single byte is sent.

Weights must be safetensors, code must be what transformers would load, texts must be free of secrets. Other files are
left out and listed. A folder with pickles, optimizer states or checkpoints is refused: it is the working folder of a
training run, not a model.
"""

import json
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from safevlm.adapter_files import ADAPTER_WEIGHTS, LORA_CONFIG, LORA_WEIGHTS
from safevlm.files import read_json
from safevlm.policy_file import policy_yaml
from safevlm.safety_policy import SafetyPolicy

from .card import CARD, can_be_regenerated, is_adapter, is_valid_repo_id, read_card, render_card
from .facts import FACTS_FILE, read_facts
from .remote_code import loaded_code, named_code
from .secrets import scan
from .weights import INDEX, WEIGHTS, check_weights, resharded

POLICY = "policy.yaml"
ALLOWED = (
    *(CARD, FACTS_FILE, POLICY, "config.json", "generation_config.json", LORA_CONFIG),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*", "CITATION.cff", "plots/*.png"),
)
BINARY = ("*.safetensors", "*.png", "*.model")
REFUSED = {
    "a pickle, which runs code when it is loaded": (
        "*.bin",
        "*.pt",
        "*.pth",
        "*.pkl",
        "*.pickle",
        "*.ckpt",
        "*.joblib",
    ),
    "an optimizer or trainer state": ("optimizer*", "scheduler*", "rng_state*", "scaler*", "trainer_state.json"),
    "a training checkpoint": ("checkpoint-*", "global_step*"),
    "a file of secrets": (".env", ".env.*", "*.pem", ".netrc", "id_rsa*"),
}


@dataclass
class Publication:
    """
    What would be pushed.

    Args:
        files (`dict[str, Path | bytes]`): Path in the repository -> the file or its content.
        left_out (`list[str]`): Files of the folder that are not sent.
    """

    files: dict[str, Path | bytes]
    left_out: list[str] = field(default_factory=list)

    def sizes(self) -> dict[str, int]:
        """Path in the repository -> size in bytes."""
        return {
            name: len(source) if isinstance(source, bytes) else source.stat().st_size
            for name, source in self.files.items()
        }


def prepare(folder: Path, repo_id: str, max_shard_size: str | int, scratch: Path) -> Publication:
    """
    Chooses and checks the files of a model's or adapter's folder. The folder itself is not changed.

    Args:
        folder (`Path`)
        repo_id (`str`): What the card's usage example loads.
        max_shard_size (`str` or `int`): Larger weight files are split.
        scratch (`Path`): Folder for the split weight files.

    Raises:
        `ValueError`: The folder does not hold a model, or holds what must not be published.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} holds no config.json; push a folder that `save_pretrained` wrote.")
    config = read_json(folder / "config.json")
    if config.get("model_type") != "safevlm":
        raise ValueError(f"{str(folder)!r} holds a model of type {config.get('model_type')!r}, not a SafeVLM.")
    present = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    _refuse(folder, present)
    adapter = is_adapter(folder)
    if adapter:
        weights = [name for name in present if name in (ADAPTER_WEIGHTS, LORA_WEIGHTS)]
    else:
        weights = [name for name in present if fnmatch(name, WEIGHTS)]
    check_weights(folder, weights)
    allowed = {name for name in present if any(fnmatch(name, pattern) for pattern in ALLOWED)}
    allowed |= _code(folder, adapter)
    files: dict[str, Path | bytes] = {name: folder / name for name in sorted(allowed)}
    if adapter:
        files |= {name: folder / name for name in weights}
    else:
        files |= resharded(folder, weights, max_shard_size, scratch)
    files["config.json"] = _config(config, adapter) or folder / "config.json"
    files[POLICY] = _policy(config)
    card = read_card(folder)
    if can_be_regenerated(card):
        files[CARD] = render_card(folder, read_facts(folder), card, model_id=repo_id).encode()
    _check_texts(files)
    left_out = [name for name in present if name not in files and name not in (*weights, INDEX)]
    return Publication(dict(sorted(files.items())), left_out)


def _refuse(folder: Path, present: list[str]):
    for name in present:
        for what, patterns in REFUSED.items():
            if any(fnmatch(part, pattern) for part in Path(name).parts for pattern in patterns):
                raise ValueError(
                    f"{str(folder)!r} holds {name!r}, {what}. Push a folder that `save_pretrained` wrote, such as "
                    f"OUT/model of `safevlm train --output OUT`, or move the file away."
                )


def _code(folder: Path, adapter: bool) -> set[str]:
    """The Python files that `trust_remote_code=True` would load: what the configurations refer to, and its imports."""
    files, elsewhere = loaded_code(folder, named_code(folder, adapter))
    if elsewhere:
        raise ValueError(
            f"{str(folder)!r}: the configuration names the code {elsewhere[0]!r}, which is not in the folder; load "
            f"the model and save it again."
        )
    return files


def _config(config: dict, adapter: bool) -> bytes | None:
    """The configuration without local paths; `None` if it can be pushed as it is."""
    published = {**config, "base_config": dict(config["base_config"])}
    if not is_valid_repo_id(published["base_config"].get("_name_or_path")):
        published["base_config"]["_name_or_path"] = ""  # a folder on this machine
    if adapter:  # its model and pipeline classes come from the package
        published.pop("custom_pipelines", None)
        classes = config.get("auto_map") or {}
        published["auto_map"] = {name: value for name, value in classes.items() if name == "AutoConfig"}
    return None if published == config else (json.dumps(published, indent=2, sort_keys=True) + "\n").encode()


def _policy(config: dict) -> bytes:
    """The policy in force, for people to read and diff. The model itself reads it from its configuration."""
    return policy_yaml(SafetyPolicy.from_value(config["safety_policy"])).encode()


def _check_texts(files: dict[str, Path | bytes]):
    findings = []
    for name, source in files.items():
        if any(fnmatch(name, pattern) for pattern in BINARY):
            continue
        content = source if isinstance(source, bytes) else source.read_bytes()
        try:
            findings += scan(name, content.decode("utf-8"))
        except UnicodeDecodeError:
            raise ValueError(f"{name} is not UTF-8 text. Nothing was pushed; save it as UTF-8.") from None
    if findings:
        raise ValueError("Nothing was pushed. " + " | ".join(map(str, findings)))
