"""What the model is: summary, how to use it, limits and risks, licence."""

import shlex

from safevlm.model_card.markdown import code, table, text

from .results import evaluated_sections


def summary(facts: dict, config: dict) -> str:
    """A table of base model, labels, policy in force and licence."""
    base = facts.get("base_model") or {}
    policy = config["safety_policy"]
    in_force = code(policy["name"]) + ("" if policy["enabled"] else ", **off: nothing is enforced**")
    rows = [
        ["**Base model**", _base_name(base)],
        ["**Base revision**", _base_revision(base)],
        ["**Risk categories**", ", ".join(map(text, config["category_names"]))],
        ["**Risk levels**", ", ".join(map(text, config["level_names"]))],
        ["**Policy in force**", in_force],
        ["**Licence**", _model_licence(facts)],
    ]
    return table(["", ""], rows)


def usage(facts: dict, model_id: str, adapter: bool) -> str:
    """How to load the model, or the adapter onto its base model."""
    model = _python_string(model_id)
    if adapter:
        base = _python_string(str((facts.get("base_model") or {}).get("name") or "BASE-MODEL"))
        return f"""\
`pip install "safevlm[train]"`, then load the adapter onto its base model:

```python
from safevlm import SafeVlmForConditionalGeneration, SafeVlmProcessor

model = SafeVlmForConditionalGeneration.from_base({base}, safety_adapter={model})
processor = SafeVlmProcessor.from_base({base}, config=model.config)
```"""
    check = code(f"safevlm code {shlex.quote(model_id)}")
    return f"""\
You need only transformers and Pillow. The model's code is in this repository: read it before you set
`trust_remote_code=True`, and **pin the commit that you read** with `revision="<commit>"`, so that no later push can
change what runs on your machine. {check} compares the code with the safevlm that you installed.

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

To use another policy for one call, pass `generate_kwargs={{"safety_policy": "strict"}}` to `pipe`; with `"off"` the
base model answers unfiltered. To get the verdict without an answer, call `pipe.model.assess(**inputs)`."""


def limits(facts: dict, config: dict) -> str:
    """Known limits and risks, and what nobody has measured."""
    evaluated = evaluated_sections(facts)
    lines = []
    if not config["safety_policy"]["enabled"]:
        lines.append("**The policy in force is off: as published, this model refuses nothing.**")
    lines += [
        "The safety head assesses images together with the question. **A request without an image is not assessed**; "
        "the base model answers it.",
        "The safety head is only as good as its training data. It was not evaluated on risk categories, image styles "
        "and languages that are missing there, nor on images crafted to attack the safety modules.",
        "Safety training makes a model less harmful, not harmless: some risky requests pass, and some harmless ones "
        "are refused. The method is known to over-block harmless questions about text in images, code, posters and "
        "celebrities.",
    ]
    if "over-refusal" not in evaluated:
        lines.append("How often this model refuses harmless requests was not evaluated.")
    if "general ability" not in evaluated:
        lines.append("How much general ability was lost in safety training was not evaluated.")
    if not facts.get("calibration"):
        lines.append("The scores are not calibrated.")
    lines.append("The model inherits all flaws of the base model and its training data.")
    return "\n".join(f"- {line}" for line in lines)


def licence(facts: dict) -> str:
    """The licences of the model, its base and its training data."""
    base = facts.get("base_model") or {}
    data = (facts.get("training") or {}).get("data") or []
    rows = [
        ["this model", _model_licence(facts)],
        [f"base model {_base_name(base)}", text(base.get("license") or "unknown: not stated in the base's card")],
        *([code(source["name"]), data_licence(source)] for source in data),
    ]
    note = (
        "The licence of the base model also applies to this model, which is derived from it. Check the licences of "
        "the data before you publish."
    )
    return table(["", "licence"], rows) + "\n\n" + note


def data_licence(source: dict) -> str:
    return text(source.get("license") or "unknown: not stated in the data")


def _model_licence(facts: dict) -> str:
    if not facts.get("license"):
        return "unknown: not chosen by the publisher"
    source = f" ({text(facts['license_source'])})" if facts.get("license_source") else ""
    return text(facts["license"]) + source


def _base_name(base: dict) -> str:
    if not base.get("name"):
        return "unknown: not recorded"
    about = f" ({text(base['about'])})" if base.get("about") else ""
    return code(base["name"]) + about


def _base_revision(base: dict) -> str:
    if base.get("revision"):
        return code(base["revision"])
    if base.get("files"):
        files = (f"{code(name)} (SHA-256 {code(digest[:16])}…)" for name, digest in base["files"].items())
        return "a local folder: " + ", ".join(files)
    return "unknown: not recorded"


def _python_string(value: str) -> str:
    """`value` as a Python literal that can end neither its quotes nor the code block around it."""
    literal = repr(value).replace("`", "\\x60")
    return f'"{literal[1:-1]}"' if '"' not in literal else literal
