"""How the model was trained: data, hyper-parameters, and environmental impact."""

from safevlm.model_card.markdown import code, table, text

from .about import data_licence

# Training arguments that get a row, in this order. Arguments that no stage sets are left out.
ARGUMENTS = (
    *("trainable", "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "optim", "adam_beta2", "weight_decay"),
    *("bf16", "fp16", "gradient_checkpointing", "activation_checkpointing", "lora_r", "lora_alpha", "lora_dropout"),
    *("safety_level_loss_coef", "safety_category_loss_coef", "label_conditioning_start", "label_conditioning_end"),
    *("hint_probability", "deepspeed", "fsdp", "seed"),
)
# What was measured while a stage trained: title, name, format.
MEASURED = (
    ("optimiser steps", "steps", "{:,}"),
    ("epochs", "epochs", "{:.2f}"),
    ("rows per step", "rows_per_step", "{:,}"),
    ("trained parameters", "trainable_parameters", "{:,}"),
    ("all parameters", "parameters", "{:,}"),
    ("last logged loss", "loss", "{:.4g}"),
)
NOT_RECORDED = "Not recorded."


def training(facts: dict) -> str:
    """Row counts, data files, labels, mixes, hyper-parameters and the command."""
    trained = facts.get("training")
    if not trained:
        return NOT_RECORDED
    parts = [text(trained["about"])] if trained.get("about") else []
    if trained.get("rows") is not None:
        parts.append(_row_counts(trained))
    if trained.get("data"):
        rows = [[code(source["name"]), _version(source), data_licence(source)] for source in trained["data"]]
        parts.append(table(["data", "SHA-256 or revision", "licence"], rows))
    for kind in ("categories", "levels"):
        if trained.get(kind):
            counts = [["rows", *(f"{count:,}" for count in trained[kind].values())]]
            parts.append(table([kind, *map(text, trained[kind])], counts, numbers=True))
    parts += [_mix(mix) for mix in trained.get("mixes") or ()]
    if trained.get("stages"):
        parts += ["### Hyper-parameters", _hyper_parameters(trained["stages"])]
    if trained.get("command"):
        parts.append(f"Command: {code(trained['command'])}")
    return "\n\n".join(parts) or NOT_RECORDED


def environment(facts: dict) -> str:
    """Training time, hardware, energy and CO₂ of each stage."""
    stages = (facts.get("training") or {}).get("stages") or []
    measured = [(stage["stage"], stage["measured"]) for stage in stages if stage.get("measured")]
    if not measured:
        return "Not measured."
    rows = []
    for name, values in measured:
        energy = "not measured" if values.get("energy_kwh") is None else f"{values['energy_kwh']:.4g} kWh"
        co2 = "not measured" if values.get("co2_kg") is None else f"{1000 * values['co2_kg']:.4g} g"
        number = f"{values['processes']} × " if values.get("processes", 1) > 1 else ""
        rows.append([code(name), _duration(values["seconds"]), number + text(values["device"]), energy, co2])
    impact = table(["stage", "training time", "hardware", "energy", "CO₂ eq."], rows)
    if all(values.get("co2_kg") is not None for _, values in measured):
        return impact
    return impact + (
        "\n\nEnergy and CO₂ are known only if codecarbon measured them (`report_to: codecarbon`). The training of "
        "the base model is not included."
    )


def _row_counts(trained: dict) -> str:
    counts = [f"{trained['rows']:,} rows trained on"]
    counts += [f"{trained['held_out']:,} held out"] if trained.get("held_out") else []
    counts += [f"{trained['skipped']:,} skipped as unusable"] if trained.get("skipped") else []
    return ", ".join(counts) + "."


def _version(source: dict) -> str:
    version = source.get("sha256") or source.get("revision")
    return code(version) if version else "unknown: not recorded"


def _mix(mix: dict) -> str:
    rows = [
        [code(name), f"{counts['read']:,}", f"{counts['chosen']:,}", text(_left_out(counts["left_out"]))]
        for name, counts in mix["sources"].items()
    ]
    return f"""\
`safevlm data mix` made {code(mix["file"])} (seed {mix["seed"]}). It left out duplicates and rows of the test sets, as
its recipe says:

{table(["source", "rows read", "chosen", "left out"], rows)}"""


def _left_out(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts.items()) or "none"


def _hyper_parameters(stages: list[dict]) -> str:
    header = ["", *(f"{number}. {code(stage['stage'])}" for number, stage in enumerate(stages, start=1))]
    rows = [
        [f"`{name}`", *(code(stage["arguments"][name]) if name in stage["arguments"] else "–" for stage in stages)]
        for name in ARGUMENTS
        if any(name in stage.get("arguments", {}) for stage in stages)
    ]
    for title, name, form in MEASURED:
        values = [(stage.get("measured") or {}).get(name) for stage in stages]
        if any(value is not None for value in values):
            rows.append([title, *("–" if value is None else form.format(value) for value in values)])
    return table(header, rows)


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
