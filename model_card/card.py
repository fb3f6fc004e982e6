"""Writes the card of a saved model: what the folder itself says, and the facts that training and evaluation measured.

No number enters a card without its data, command, device and date; what was not measured reads "not evaluated". Free
text that a person wrote stays as it is when the card is made anew (`free_text.py`).
"""

import json
import os
import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from safevlm.adapter_files import ADAPTER_WEIGHTS, LORA_WEIGHTS

from .facts import check_facts, read_facts, write_facts, write_text
from .free_text import DEFAULTS, block, read_free_text
from .markdown import text
from .sections import about, policy, results, training

CARD = "README.md"
TAGS = ("safevlm", "safety", "guardrail", "custom_code")
# What the front matter says of itself; a person's further fields, and a licence that the facts do not know, stay.
_OURS = {"base_model", "base_model_relation", "datasets", "library_name", "model-index", "pipeline_tag", "tags"}
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def write_card(model_dir: str | os.PathLike, facts: dict, model_id: str | None = None) -> Path:
    """
    Writes `README.md` and `card_facts.json` into a saved model's folder.

    Args:
        model_dir: Folder with the model's `config.json`. Free text of a card that is there is kept.
        facts (`dict`): See `facts.py`.
        model_id (`str`, *optional*): What the usage example loads; by default the folder's name.

    Raises:
        `ValueError`: Numbers without their origin, or a `README.md` there that safevlm did not write.
    """
    model_dir = Path(model_dir)
    path = model_dir / CARD
    card = render_card(model_dir, facts, existing_card(model_dir), model_id)
    if not is_ours(existing_card(model_dir)):
        raise ValueError(f"{path} was not written by safevlm; move it away to get a generated card.")
    write_facts(model_dir, facts)
    write_text(path, card)
    return path


def refresh_card(model_dir: str | os.PathLike, model_id: str | None = None) -> Path:
    """Makes the card anew from the folder's `config.json` and `card_facts.json`, such as after a change of policy."""
    return write_card(model_dir, read_facts(model_dir), model_id)


def existing_card(model_dir: Path) -> str | None:
    path = model_dir / CARD
    try:
        return path.read_bytes().decode("utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}.") from None


def is_ours(card: str | None) -> bool:
    """Whether a card can be made anew without losing a person's words."""
    return card is None or not card.strip() or bool(read_free_text(card))


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, not a whole model."""
    adapter = any((folder / name).is_file() for name in (ADAPTER_WEIGHTS, LORA_WEIGHTS))
    return adapter and not any(folder.glob("model*.safetensors"))


def render_card(model_dir: Path, facts: dict, existing: str | None = None, model_id: str | None = None) -> str:
    """The text of the card. Arguments as for [`write_card`]; `existing` is the card that it takes the place of."""
    check_facts(facts)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    front = _front_matter(existing)
    facts = {**facts, "license": front.get("license_name") or front.get("license") or facts.get("license")}
    adapter = is_adapter(model_dir)
    model_id = model_dir.resolve().name if model_id is None else model_id
    free_text = {name: block(name, content) for name, content in {**DEFAULTS, **_free_text(existing)}.items()}
    card = ModelCard.from_template(
        _metadata(facts, front, adapter),
        template_path=str(Path(__file__).with_name("template.md")),
        title=text(facts["model_name"]),
        adapter=adapter,
        summary=about.summary(facts, config),
        usage=about.usage(facts, model_id, adapter),
        policy=policy.policy(config),
        results=results.results(facts, config),
        calibration=results.calibration(facts, config),
        training=training.training(facts),
        environment=training.environment(facts),
        limits=about.limits(facts, config),
        licence=about.licence(facts),
        **free_text,
    )
    return str(card).rstrip("\n") + "\n"


def _free_text(existing: str | None) -> dict[str, str]:
    return {} if existing is None else read_free_text(existing)


def _metadata(facts: dict, front: dict, adapter: bool) -> ModelCardData:
    """The front matter: ours, and what a person added to the existing one, such as a licence of their choice."""
    kept = {name: value for name, value in front.items() if name not in _OURS}
    tags = front.get("tags") if isinstance(front.get("tags"), list) else []
    base = (facts.get("base_model") or {}).get("name")
    if facts.get("license") and _LICENSE.fullmatch(str(facts["license"])):
        kept.setdefault("license", facts["license"])
    results = eval_results(facts)
    data = ModelCardData(
        **{"language": facts.get("language", "en"), **kept},
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=[*TAGS, *(tag for tag in tags if isinstance(tag, str))],
        base_model=base if is_hub_id(base) else None,
        datasets=[name for name in _data_names(facts) if is_hub_id(name)] or None,
        eval_results=results or None,
        model_name=_one_line(facts["model_name"]) if results else None,
    )
    if is_hub_id(base):
        data["base_model_relation"] = "adapter" if adapter else "finetune"
    return data


def _front_matter(card: str | None) -> dict:
    match = _FRONT_MATTER.match(card or "")
    if match is None:
        return {}
    try:
        found = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise ValueError(f"{CARD}: the metadata between its '---' lines is no valid YAML: {error}") from None
    if not isinstance(found, (dict, type(None))):
        raise ValueError(f"{CARD}: the metadata between its '---' lines must map names to values.")
    return {str(name): value for name, value in (found or {}).items()}


def eval_results(facts: dict) -> list[EvalResult]:
    """The measures of the model itself, for the card's `model-index`."""
    found = []
    for result in facts.get("results") or ():
        for measure in result["measures"]:
            value = measure["values"].get(result.get("system"))
            if value is None:
                continue
            dataset = _one_line(measure.get("task") or result["title"])
            found.append(
                EvalResult(
                    task_type="image-text-to-text",
                    dataset_type=re.sub(r"[^a-z0-9_.-]+", "-", dataset.lower()).strip("-") or "data",
                    dataset_name=dataset,
                    dataset_revision=result.get("revision"),
                    metric_type=measure["name"],
                    metric_name=_one_line(measure.get("title") or measure["name"]),
                    metric_value=round(value, 6),
                )
            )
    return found


def is_hub_id(name: str | None) -> bool:
    """Whether a name can be that of a repository on the Hub (and is none of a local folder)."""
    if not name or name.count("/") != 1 or name.startswith((".", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _data_names(facts: dict) -> list[str]:
    data = (facts.get("training") or {}).get("data") or []
    return [entry["name"] for entry in data if not entry.get("sha256")]  # a Hub set has no file here


def _one_line(value: str) -> str:
    return " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())
