"""Writes the card of a saved model: what the folder itself says, and the facts that the caller measured.

No number enters a card without its data, command, device and date; what was not measured reads "not evaluated".
"""

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("template.md")


def write_card(model_dir: str | Path, facts: dict) -> Path:
    """
    Writes `README.md` into a saved model's folder.

    Args:
        model_dir: Folder with the model's `config.json`.
        facts (`dict`): `model_name`, `base_model`, `training_data`; and, where there are any, `metrics` (per column,
            name -> value in [0, 1]) with their `evaluation` (`data`, `command`, `device`, `torch`, `transformers`,
            `date`), and `stages` (training arguments per stage).

    Raises:
        `ValueError`: `metrics` without `evaluation`.
    """
    if facts.get("metrics") and not facts.get("evaluation"):
        raise ValueError(
            "`metrics` need `evaluation` (data, command, device, versions, date): no number without its origin."
        )
    model_dir = Path(model_dir)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    policy = config["safety_policy"]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["safevlm", "safety", "custom_code"],
        language=facts.get("language", "en"),
        license=facts.get("license"),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=facts["model_name"],
        model_id=facts.get("model_id", model_dir.name),
        base_model=facts["base_model"],
        training_data=facts["training_data"],
        categories=", ".join(config["category_names"]),
        levels=", ".join(config["level_names"]),
        policy=policy,
        policy_line=_policy_line(policy, config["level_names"]),
        temperatures=f"{policy['level_temperature']} and {policy['category_temperature']}",
        results_table=_results_table(facts.get("metrics") or {}),
        evaluation_line=_evaluation_line(facts.get("evaluation") or {}),
        stages_table=_stages_table(facts.get("stages") or []),
    )
    path = model_dir / "README.md"
    card.save(path)
    return path


def _policy_line(policy: dict, level_names: list[str]) -> str:
    if not policy["enabled"]:
        return "off"
    actions = ", ".join(f"{level} → {policy['level_actions'].get(level, 'allow')}" for level in level_names)
    refusal = "forced refusal" if policy["forced_refusal"] else "refusal by hint"
    return f"{actions}; risky from a probability of {policy['risk_threshold']}; {refusal}"


def _results_table(metrics: dict[str, dict]) -> str:
    if not metrics:
        return "Not evaluated."
    names = list(dict.fromkeys(name for column in metrics.values() for name in column))
    lines = ["| % | " + " | ".join(metrics) + " |", "|---|" + "---:|" * len(metrics)]
    for name in names:
        values = [column.get(name) for column in metrics.values()]
        lines.append(f"| {name} | " + " | ".join("-" if v is None else f"{100 * v:.1f}" for v in values) + " |")
    return "\n".join(lines)


def _evaluation_line(evaluation: dict) -> str:
    if not evaluation:
        return ""
    return (
        f"On {evaluation['data']}; `{evaluation['command']}`, {evaluation['device']}, torch {evaluation['torch']}, "
        f"transformers {evaluation['transformers']}, {evaluation['date']}."
    )


def _stages_table(stages: list[dict]) -> str:
    if not stages:
        return "Not recorded."
    names = ["stage", "learning_rate", "max_steps", "num_train_epochs", "warmup_steps", "per_device_train_batch_size"]
    names += ["gradient_accumulation_steps", "lora_r"]
    names = [name for name in names if any(name in stage for stage in stages)]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(stage.get(name, "-")) for name in names) + " |" for stage in stages]
    return "\n".join(lines)
