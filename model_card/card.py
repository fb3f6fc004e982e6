"""Writes the card of a saved model, from the folder itself and the facts that training and evaluation recorded.

The order of the sections is in `template.md`, their content in `sections/`. No number enters a card without its data,
command, device and date; what was not measured reads "not evaluated". The publisher's own text survives when the card
is regenerated (`free_text.py`).
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
from safevlm.files import is_hub_id, replace_text

from .facts import check_facts, read_facts, write_facts
from .free_text import DEFAULTS, block, read_free_text
from .markdown import text
from .sections import about, policy, results, training

CARD = "README.md"
TAGS = ("safevlm", "safety", "guardrail", "custom_code")
# Metadata fields that safevlm sets. Fields that the publisher adds stay, and so does a licence of their choice.
_GENERATED_FIELDS = {
    *("base_model", "base_model_relation", "datasets", "library_name", "model-index", "pipeline_tag", "tags")
}
_METADATA = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def write_card(model_dir: str | os.PathLike, facts: dict, model_id: str | None = None) -> Path:
    """
    Writes `README.md` and `card_facts.json` into the folder of a saved model; returns the card's path.

    Args:
        model_dir: Folder with the model's `config.json`. The free text of an existing card is kept.
        facts (`dict`): See `facts.py`.
        model_id (`str`, *optional*): What the usage example loads; by default the folder's name.

    Raises:
        `ValueError`: There are numbers without their origin, or safevlm did not write the existing `README.md`.
    """
    model_dir = Path(model_dir)
    path = model_dir / CARD
    existing = read_card(model_dir)
    card = render_card(model_dir, facts, existing, model_id)
    if not can_be_regenerated(existing):
        raise ValueError(f"{path} was not written by safevlm; move it away to get a generated card.")
    write_facts(model_dir, facts)
    replace_text(path, card)
    return path


def refresh_card(model_dir: str | os.PathLike, model_id: str | None = None) -> Path:
    """Regenerates the card from the folder's `config.json` and `card_facts.json`, such as after a policy change."""
    return write_card(model_dir, read_facts(model_dir), model_id)


def read_card(model_dir: Path) -> str | None:
    """The text of a folder's card; `None` if there is none."""
    path = model_dir / CARD
    try:
        return path.read_bytes().decode("utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from None


def can_be_regenerated(card: str | None) -> bool:
    """Whether safevlm wrote the card (or there is none), so that regenerating it loses nobody's words."""
    return card is None or not card.strip() or bool(read_free_text(card))


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a whole model."""
    adapter = any((folder / name).is_file() for name in (ADAPTER_WEIGHTS, LORA_WEIGHTS))
    return adapter and not any(folder.glob("model*.safetensors"))


def is_valid_repo_id(name: str | None) -> bool:
    """Whether the Hub accepts a name such as `owner/name` for a repository. It rejects some that have this form."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return is_hub_id(name)


def render_card(model_dir: Path, facts: dict, existing: str | None = None, model_id: str | None = None) -> str:
    """The text of the card. Arguments as for [`write_card`]; `existing` is the text of the card that it replaces."""
    check_facts(facts)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    metadata = _read_metadata(existing)
    facts = {**facts, "license": metadata.get("license_name") or metadata.get("license") or facts.get("license")}
    adapter = is_adapter(model_dir)
    model_id = model_dir.resolve().name if model_id is None else model_id
    free_text = {**DEFAULTS, **({} if existing is None else read_free_text(existing))}
    card = ModelCard.from_template(
        _metadata(facts, metadata, adapter),
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
        **{name: block(name, content) for name, content in free_text.items()},
    )
    return str(card).rstrip("\n") + "\n"


def _metadata(facts: dict, existing: dict, adapter: bool) -> ModelCardData:
    """The metadata: the generated fields, and those that the publisher added to the existing card."""
    kept = {name: value for name, value in existing.items() if name not in _GENERATED_FIELDS}
    tags = existing.get("tags") if isinstance(existing.get("tags"), list) else []
    base = (facts.get("base_model") or {}).get("name")
    if facts.get("license") and _LICENSE.fullmatch(str(facts["license"])):
        kept.setdefault("license", facts["license"])
    evaluations = eval_results(facts)
    data = ModelCardData(
        **{"language": facts.get("language", "en"), **kept},
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=[*TAGS, *(tag for tag in tags if isinstance(tag, str))],
        base_model=base if is_valid_repo_id(base) else None,
        datasets=[name for name in _hub_datasets(facts) if is_valid_repo_id(name)] or None,
        eval_results=evaluations or None,
        model_name=_one_line(facts["model_name"]) if evaluations else None,
    )
    if is_valid_repo_id(base):
        data["base_model_relation"] = "adapter" if adapter else "finetune"
    return data


def _read_metadata(card: str | None) -> dict:
    """The fields between the `---` lines at the top of a card."""
    match = _METADATA.match(card or "")
    if match is None:
        return {}
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise ValueError(f"{CARD}: the metadata between its '---' lines is not valid YAML: {error}") from None
    if not isinstance(metadata, (dict, type(None))):
        raise ValueError(f"{CARD}: the metadata between its '---' lines must map names to values.")
    return {str(name): value for name, value in (metadata or {}).items()}


def eval_results(facts: dict) -> list[EvalResult]:
    """The model's own measures, for the `model-index` of the metadata."""
    entries = []
    for result in facts.get("results") or ():
        for measure in result["measures"]:
            value = measure["values"].get(result.get("system"))
            if value is None:
                continue
            dataset = _one_line(measure.get("task") or result["title"])
            entries.append(
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
    return entries


def _hub_datasets(facts: dict) -> list[str]:
    data = (facts.get("training") or {}).get("data") or []
    return [source["name"] for source in data if not source.get("sha256")]  # a local file has a digest


def _one_line(value: str) -> str:
    return " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())
