"""What training added to a base model, as an adapter's folder of its own: safety modules, and LoRA weights if any.

An adapter can replace the whole model only if nothing else was trained: on the untouched base it would otherwise be a
different model.
"""

import shutil
from pathlib import Path

from safevlm.adapter_files import ADAPTER_WEIGHTS, LORA_CONFIG, LORA_WEIGHTS
from safevlm.files import read_json, replace_json

from .card import CARD, is_adapter
from .facts import FACTS_FILE, read_facts
from .weights import WEIGHTS, check_weights, extract_safety_modules


def adapter_folder(folder: Path, scratch: Path) -> Path:
    """
    The folder of an adapter: `folder` itself, or one in `scratch`, made from the whole model in `folder`.

    Raises:
        `ValueError`: More was trained than an adapter can hold.
    """
    if is_adapter(folder):
        return folder
    lora = _trained_lora(folder)
    adapter = scratch / folder.resolve().name
    weights = sorted(path.name for path in folder.glob(WEIGHTS))
    check_weights(folder, weights)
    adapter.mkdir()
    from safevlm import SafeVlmConfig  # loads torch, which a push of a whole model does not need

    SafeVlmConfig.from_pretrained(folder).save_pretrained(adapter)
    if lora is None:
        extract_safety_modules(folder, weights, adapter / ADAPTER_WEIGHTS)
    else:
        (adapter / LORA_CONFIG).parent.mkdir()
        shutil.copy(lora / Path(LORA_WEIGHTS).name, adapter / LORA_WEIGHTS)
        config = read_json(lora / Path(LORA_CONFIG).name)
        config["base_model_name_or_path"] = read_facts(folder)["base_model"]["name"]  # instead of a local folder
        replace_json(adapter / LORA_CONFIG, config)
    for name in (FACTS_FILE, CARD):
        if (folder / name).is_file():
            shutil.copy(folder / name, adapter / name)
    if (folder / "plots").is_dir():
        shutil.copytree(folder / "plots", adapter / "plots")
    return adapter


def _trained_lora(folder: Path) -> Path | None:
    """
    The folder of the last stage's LoRA weights, which include the safety modules. `None` if only the safety modules
    were trained.

    Raises:
        `ValueError`: More was trained than can be separated from the base.
    """
    stages = (read_facts(folder).get("training") or {}).get("stages") or []
    arguments = [stage.get("arguments", {}) for stage in stages]
    beyond_safety = [i for i, given in enumerate(arguments) if given.get("trainable") != ["safety"]]
    if stages and not beyond_safety:
        return None
    only_last = beyond_safety == [len(stages) - 1]
    if only_last and arguments[-1].get("lora_r") and "safety" in arguments[-1]["trainable"]:
        lora = folder.resolve().parent / f"{len(stages)}-{stages[-1]['stage']}" / "adapter"
        if all((lora / Path(name).name).is_file() for name in (LORA_CONFIG, LORA_WEIGHTS)):
            return lora
        reason = f"its stage {stages[-1]['stage']!r} trained LoRA, which is not in {str(lora)!r}"
    elif beyond_safety:
        stage = stages[beyond_safety[0]]["stage"]
        reason = f"its stage {stage!r} trained more than the safety modules, and not as the last stage with LoRA"
    else:
        reason = "there is no record of how it was trained"
    raise ValueError(
        f"--adapter-only: the safety modules of {str(folder)!r} cannot go alone, because {reason}. On the untouched "
        f"base they would be a different model. Push the whole model, or a folder that `save_safety_adapter` wrote, "
        f"such as that of stage 1's model."
    )
