"""The generated sections of a card, from the facts and the model's configuration. Names and fields are escaped."""

import shlex
from collections.abc import Iterable

from .facts import SECTIONS, policy_mark
from .markdown import code, table, text

NOT_EVALUATED = "Not evaluated."
ACTIONS = {
    "allow": "the base model answers",
    "caution": "it answers, told to be cautious",
    "warn": "it is told to warn and may decline",
    "refuse": "it declines",
}
# Training arguments worth a row, in this order; those that no stage sets are left out.
ARGUMENTS = (
    *("trainable", "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "optim", "adam_beta2", "weight_decay"),
    *("bf16", "fp16", "gradient_checkpointing", "activation_checkpointing", "lora_r", "lora_alpha", "lora_dropout"),
    *("safety_level_loss_coef", "safety_category_loss_coef", "label_conditioning_start", "label_conditioning_end"),
    *("hint_probability", "deepspeed", "fsdp", "seed"),
)

MEASURED = (
    ("optimiser steps", "steps", "{:,}"),
    ("epochs", "epochs", "{:.2f}"),
    ("rows a step", "rows_per_step", "{:,}"),
    ("trained parameters", "trainable_parameters", "{:,}"),
    ("all parameters", "parameters", "{:,}"),
    ("last logged loss", "loss", "{:.4g}"),
)


def summary(facts: dict, config: dict) -> str:
    base = facts.get("base_model") or {}
    policy = config["safety_policy"]
    in_force = code(policy["name"]) + ("" if policy["enabled"] else ", **off: nothing is enforced**")
    rows = [
        ["**Base model**", _base(base)],
        ["**Base revision**", _base_revision(base)],
        ["**Risk categories**", ", ".join(map(text, config["category_names"]))],
        ["**Risk levels**", ", ".join(map(text, config["level_names"]))],
        ["**Policy in force**", in_force],
        ["**Licence**", _license(facts)],
    ]
    return table(["", ""], rows)


def _base(base: dict) -> str:
    if not base.get("name"):
        return "unknown: not recorded"
    about = f" ({text(base['about'])})" if base.get("about") else ""
    return code(base["name"]) + about


def _base_revision(base: dict) -> str:
    if base.get("revision"):
        return code(base["revision"])
    if base.get("files"):
        return "a local folder: " + ", ".join(f"{code(n)} (SHA-256 {code(h[:16])}…)" for n, h in base["files"].items())
    return "unknown: not recorded"


def usage(facts: dict, model_id: str, adapter: bool) -> str:
    # In the code block, as a Python literal: an id from elsewhere cannot end the string, or the block.
    model = repr(model_id).replace("`", "\\x60")
    model = f'"{model[1:-1]}"' if '"' not in model else model
    if adapter:
        base = repr(str((facts.get("base_model") or {}).get("name") or "BASE-MODEL")).replace("`", "\\x60")
        return f"""\
`pip install "safevlm[train]"`, then put the adapter on its base model:

```python
from safevlm import SafeVlmForConditionalGeneration, SafeVlmProcessor

model = SafeVlmForConditionalGeneration.from_base({base}, safety_adapter={model})
processor = SafeVlmProcessor.from_base({base}, config=model.config)
```"""
    check = code(f"safevlm code {shlex.quote(model_id)}")
    return f"""\
With transformers and Pillow alone. The model's code is in this repository: read it before you set
`trust_remote_code=True`, and **pin the commit you read** with `revision="<commit>"`, so that a later push cannot
change what runs on your machine. {check} tells whether it is safevlm's released code.

```python
from PIL import Image
from transformers import pipeline

pipe = pipeline("image-text-to-text", model={model}, trust_remote_code=True)
image = {{"type": "image", "image": Image.open("picture.png")}}
content = [image, {{"type": "text", "text": "What is in the picture?"}}]
answer = pipe(text=[{{"role": "user", "content": content}}], return_full_text=False, max_new_tokens=64)[0]
print(answer["generated_text"])  # the answer, or the refusal
print(answer["safety"])  # action, category, level, score in [0, 1], probabilities
```

Another policy for one call: `pipe(..., generate_kwargs={{"safety_policy": "strict"}})`; `"off"` gives the base model's
own answer. The verdict alone, without an answer: `pipe.model.assess(**inputs)`."""


def policy(config: dict) -> str:
    own, categories, levels = config["safety_policy"], config["category_names"], config["level_names"]
    if not own["enabled"]:
        return (
            f"The policy is {code(own['name'])}: **nothing is enforced**, `generate()` gives the base model's answer."
        )
    thresholds = own["category_risk_thresholds"]
    risky = [name for name in categories if name != config["safe_category"]]
    rows = []
    for name in risky:
        actions = {**own["level_actions"], **own["category_actions"].get(name, {})}
        cells = [f"`{actions.get(level, 'allow')}`" for level in levels]
        rows.append([text(name), f"{thresholds.get(name, own['risk_threshold']):.4g}", *cells])
    used = [action for action in ACTIONS if any(f"`{action}`" in row for row in rows)]
    meaning = "; ".join(f"`{action}`: {ACTIONS[action]}" for action in used)
    refusal = (
        f"A refusal is written by the policy, in {code(own['language'])}, whatever the language model would say."
        if own["forced_refusal"]
        else "A refusal is asked for by a hint; the language model has the last word."
    )
    calibrated = own["level_temperature"] != 1 or own["category_temperature"] != 1
    return f"""\
Policy {code(own["name"])}. A request is risky when its probability of any risk reaches the threshold of its most
probable category; then the level decides.

{table(["category", "threshold", *map(text, levels)], rows)}

{meaning}. {refusal} Temperatures of the probabilities: level {own["level_temperature"]:.4g}, category
{own["category_temperature"]:.4g}{"" if calibrated else " (not calibrated)"}."""


def results(facts: dict, config: dict) -> str:
    parts = [_result(result, config) for result in facts.get("results") or ()]
    if parts:
        parts = ["Rates in percent; ↑ higher is better, ↓ lower is better; *n*: number of rows.", *parts]
    if missing := [section for section in SECTIONS if section not in measured_sections(facts)]:
        parts.append(f"Not evaluated: {', '.join(missing)}." if parts else NOT_EVALUATED)
    parts += [_image(plot) for plot in _plots(facts, calibration=False)]
    return "\n\n".join(parts)


def _result(result: dict, config: dict) -> str:
    counted = any(measure.get("n") is not None for measure in result["measures"])
    systems = list(dict.fromkeys(system for measure in result["measures"] for system in measure["values"]))
    own = result.get("system")
    header = [
        "",
        *(["*n*"] if counted else []),
        *(f"{text(s)} (this model)" if s == own and len(systems) > 1 else text(s) for s in systems),
    ]
    rows = []
    for section in SECTIONS:
        part = [measure for measure in result["measures"] if measure["section"] == section]
        if part:
            rows.append([f"*{section}*", *[""] * (len(header) - 1)])
        for measure in part:
            arrow = {True: " ↑", False: " ↓", None: ""}[measure.get("higher_is_better")]
            title = text(measure.get("title") or measure["name"]) + arrow
            count = ["" if measure.get("n") is None else f"{measure['n']:,}"] if counted else []
            rows.append([title, *count, *(_value(measure, system) for system in systems)])
    return "\n\n".join([f"### {text(result['title'])}", table(header, rows, numbers=True), _origin(result, config)])


def _value(measure: dict, system: str) -> str:
    value = measure["values"].get(system)
    if value is None:
        return "–"
    scale = 100 if measure.get("percent", True) else 1
    shown = f"{scale * value:.{1 if scale == 100 else 2}f}"
    low_high = (measure.get("intervals") or {}).get(system)
    return shown if not low_high else f"{shown} ({scale * low_high[0]:.1f}–{scale * low_high[1]:.1f})"


def _origin(measured: dict, config: dict) -> str:
    versions = ", ".join(f"{text(name)} {text(version)}" for name, version in (measured.get("versions") or {}).items())
    revision = f"revision {code(measured['revision'])}" if measured.get("revision") else "revision not recorded"
    parts = [f"Data: {text(measured['data'])} ({revision})", f"command: {code(measured['command'])}"]
    parts += [
        f"{text(measured['device'])}; {versions}" if versions else text(measured["device"]),
        text(measured["date"]),
    ]
    then = measured.get("policy")
    if then is not None and then != policy_mark(config["safety_policy"]):
        parts.append(
            f"**measured under another policy ({code(then['name'])}) than the one in force: what depends on it is out "
            f"of date**"
        )
    return "; ".join(parts) + "."


def calibration(facts: dict, config: dict) -> str:
    found = facts.get("calibration")
    if not found:
        return (
            "Not calibrated: scores rank requests, but a score of 0.8 need not mean that four of five such requests "
            "are risky. `safevlm calibrate` fits the policy on labelled rows."
        )
    aim = found["aim"]
    wanted = (
        f"at most {100 * aim['target_fpr']:.4g} % of clean rows flagged"
        if "target_fpr" in aim
        else f"least cost, a missed risky row counting as {aim['cost_ratio']:.4g} flagged clean ones"
    )
    halves = "; ".join(
        f"{name} {half['rows']:,} rows ({half['risky']:,} risky) about {half['images']:,} images"
        for name, half in (("fitted on", found["fit"]), ("reported on", found["report"]))
    )
    rows = [
        [text(measure["title"]), *(_value(measure, system) for system in ("before", "after"))]
        for measure in found["measures"]
    ]
    warnings = [f"- {text(warning)}" for warning in found.get("warnings") or ()]
    return "\n\n".join(
        [
            f"Aim: {wanted}. Temperatures and thresholds were {halves}, no image being in both. 95 % intervals.",
            table(["%", "before", "after"], rows, numbers=True),
            _origin(found, config),
            *(["\n".join(warnings)] if warnings else []),
            *_images(list(_plots(facts, calibration=True))),
        ]
    )


def _plots(facts: dict, calibration: bool) -> Iterable[dict]:
    return (plot for plot in facts.get("plots") or () if bool(plot.get("calibration")) == calibration)


def _image(plot: dict) -> str:
    return f"![{text(plot['title'])}]({plot['file']})\n\n*{text(plot['title'])}*"


def _images(plots: list[dict]) -> list[str]:
    """Two plots, and the others folded."""
    shown, more = [_image(plot) for plot in plots[:2]], [_image(plot) for plot in plots[2:]]
    folded = ["<details><summary>More plots</summary>", *more, "</details>"] if more else []
    return [*shown, *folded]


def training(facts: dict) -> str:
    found = facts.get("training")
    if not found:
        return "Not recorded."
    parts = []
    if found.get("about"):
        parts.append(text(found["about"]))
    counts = []
    if found.get("rows") is not None:
        counts = [f"{found['rows']:,} rows trained on"]
        counts += [f"{found['held_out']:,} held out"] if found.get("held_out") else []
        counts += [f"{found['skipped']:,} skipped as unusable"] if found.get("skipped") else []
        parts.append(", ".join(counts) + ".")
    if found.get("data"):
        rows = [
            [code(data["name"]), _data_version(data), text(data.get("license") or "unknown: not stated in the data")]
            for data in found["data"]
        ]
        parts.append(table(["data", "SHA-256 or revision", "licence"], rows))
    for kind in ("categories", "levels"):
        if found.get(kind):
            names = list(found[kind])
            counts = [["rows", *(f"{found[kind][name]:,}" for name in names)]]
            parts.append(table([kind, *map(text, names)], counts, numbers=True))
    parts += [_mix(mix) for mix in found.get("mixes") or ()]
    if found.get("stages"):
        parts += ["### Hyper-parameters", _stages(found["stages"])]
    if found.get("command"):
        parts.append(f"Command: {code(found['command'])}")
    return "\n\n".join(parts) or "Not recorded."


def _data_version(data: dict) -> str:
    if data.get("sha256"):
        return code(data["sha256"])
    return code(data["revision"]) if data.get("revision") else "unknown: not recorded"


def _mix(mix: dict) -> str:
    sources = [
        [code(name), f"{counts['read']:,}", f"{counts['chosen']:,}", text(_left_out(counts["left_out"]))]
        for name, counts in mix["sources"].items()
    ]
    return f"""\
{code(mix["file"])} was drawn by `safevlm data mix` (seed {mix["seed"]}), with duplicates and rows of the test sets
left out as the recipe says:

{table(["source", "rows read", "chosen", "left out"], sources)}"""


def _left_out(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts.items()) or "none"


def _stages(stages: list[dict]) -> str:
    header = ["", *(f"{i}. {code(stage['stage'])}" for i, stage in enumerate(stages, start=1))]
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


def environment(facts: dict) -> str:
    stages = (facts.get("training") or {}).get("stages") or []
    measured = [(stage["stage"], stage["measured"]) for stage in stages if stage.get("measured")]
    if not measured:
        return "Not measured."
    rows = []
    for name, found in measured:
        energy = "not measured" if found.get("energy_kwh") is None else f"{found['energy_kwh']:.4g} kWh"
        co2 = "not measured" if found.get("co2_kg") is None else f"{1000 * found['co2_kg']:.4g} g"
        number = f"{found['processes']} × " if found.get("processes", 1) > 1 else ""
        device = number + text(found["device"])
        rows.append([code(name), _duration(found["seconds"]), device, energy, co2])
    notes = (
        ""
        if all(found.get("co2_kg") is not None for _, found in measured)
        else (
            "\n\nEnergy and CO₂ are stated where codecarbon measured them (`report_to: codecarbon`). Training of the "
            "base model is not included."
        )
    )
    return table(["stage", "training time", "hardware", "energy", "CO₂ eq."], rows) + notes


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return (
        f"{hours} h {minutes:02} min" if hours else f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
    )


def measured_sections(facts: dict) -> set[str]:
    found = {measure["section"] for result in facts.get("results") or () for measure in result["measures"]}
    return found | ({"safety head"} if facts.get("calibration") else set())


def limits(facts: dict, config: dict) -> str:
    measured = measured_sections(facts)
    lines = [
        "The head reads images together with the question. **A request without an image is not assessed**, and gets "
        "the base model's answer.",
        "It is as good as its training data. Risk categories, image styles and languages that these lack were not "
        "evaluated; nor were adversarial images made against the safety modules.",
        "Safety training makes a model less harmful, not harmless: some risky requests pass, some harmless ones are "
        "refused. The known weak side of the method is over-blocking of harmless OCR, code, poster and celebrity "
        "questions.",
    ]
    if "over-refusal" not in measured:
        lines.append("How often this model refuses harmless requests was not evaluated.")
    if "general ability" not in measured:
        lines.append("What safety training cost in general ability was not evaluated.")
    if not facts.get("calibration"):
        lines.append("Scores are not calibrated.")
    lines.append("Everything wrong with the base model and its training data is inherited.")
    if not config["safety_policy"]["enabled"]:
        lines.insert(0, "**The policy in force is off: this model, as published, refuses nothing.**")
    return "\n".join(f"- {line}" for line in lines)


def licence(facts: dict) -> str:
    base = facts.get("base_model") or {}
    data = (facts.get("training") or {}).get("data") or []
    rows = [
        ["this model", _license(facts)],
        [f"base model {_base(base)}", text(base.get("license") or "unknown: not stated in the base's card")],
        *([code(d["name"]), text(d.get("license") or "unknown: not stated in the data")] for d in data),
    ]
    note = "What was derived from the base model is bound by its licence, too; check the data's before you publish."
    return table(["", "licence"], rows) + "\n\n" + note


def _license(facts: dict) -> str:
    if not facts.get("license"):
        return "unknown: not chosen by the publisher"
    source = f" ({text(facts['license_source'])})" if facts.get("license_source") else ""
    return text(facts["license"]) + source
