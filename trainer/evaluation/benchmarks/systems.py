"""The systems that are compared: a checkpoint and how it is asked (policy, guard prompt, guard model)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import AutoConfig

from safevlm import SafeVlmConfig
from safevlm.model_card.facts import policy_mark
from safevlm.safety_policy import POLICY_PRESETS
from safevlm.trainer.recipe import StageFolder

GUARD_PROMPT = Path(__file__).with_name("guard_prompt.txt")
COMPARISONS = ("base", "guard-prompt", "stage1", "stage2", "presets", "guard:MODEL_ID")


@dataclass(frozen=True)
class System:
    """
    Args:
        name (`str`): The name of the table's row and of the results' folder.
        checkpoint (`str`): Folder or Hub id.
        policy (`str`, *optional*): Preset or policy file; by default the SafeVLM's own.
        prefix (`str`, *optional*): Text before the first question of every conversation.
        guard (`str`, *optional*): Folder or Hub id of a guard model that is asked first.
    """

    name: str
    checkpoint: str
    policy: str | None = None
    prefix: str | None = None
    guard: str | None = None

    def describe(self) -> dict[str, str]:
        """The fields that are set, for `results.json` and `settings.json`."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def model_policy(self) -> dict[str, str] | None:
        """
        Name and digest of the checkpoint's own policy: the card tells from them whether results are out of date.
        `None` for a model that is not a SafeVLM.
        """
        config = AutoConfig.from_pretrained(self.checkpoint)
        return policy_mark(config.safety_policy) if config.model_type == SafeVlmConfig.model_type else None


def make_systems(model: str, policy: str | None = None, compare: Sequence[str] = ()) -> list[System]:
    """
    The systems that `safevlm evaluate MODEL --policy ... --compare ...` asks for.

    Args:
        model (`str`): Folder or Hub id of a SafeVLM or another vision-language model.
        policy (`str`, *optional*): Preset or policy file for the model.
        compare: Any of `base` (the model without safety, as named in the SafeVLM's config), `guard-prompt` (the base
            with the text of `guard_prompt.txt`), `stage1` (found beside the model), `stage2` (the model itself),
            `presets` (the model under each policy preset), `guard:MODEL_ID` (the base behind a guard model).
            `base=PATH` and `stage1=PATH` name checkpoints that are elsewhere. The model itself is always a system.
    """
    config = AutoConfig.from_pretrained(model)
    is_safe = config.model_type == SafeVlmConfig.model_type
    paths = dict(item.split("=", 1) for item in compare if "=" in item)
    if unknown := set(paths) - {"base", "stage1"}:
        raise ValueError(f"--compare {sorted(unknown)[0]}=...: only base and stage1 take a path.")
    names = [item.split("=", 1)[0] for item in compare]
    base = model
    if is_safe and any(name in ("base", "guard-prompt") or name.startswith("guard:") for name in names):
        base = paths.get("base") or _base_of(model, config)
    systems = []
    for name in names:
        if name == "base":
            systems.append(System("base", base))
        elif name == "guard-prompt":
            systems.append(System("guard-prompt", base, prefix=GUARD_PROMPT.read_text(encoding="utf-8")))
        elif name.startswith("guard:") and name != "guard:":
            guard = name.removeprefix("guard:")
            systems.append(System(f"guard-{Path(guard).name}", base, guard=guard))
        elif name in ("stage1", "stage2", "presets") and not is_safe:
            raise ValueError(f"--compare {name} needs a SafeVLM, but {model!r} is a {config.model_type} model.")
        elif name == "stage1":
            systems.append(System("stage1", paths.get("stage1") or _stage1_of(model), policy))
        elif name == "stage2":
            systems.append(System("stage2", model, policy))
        elif name == "presets":
            systems += [System(f"policy-{preset}", model, preset) for preset in POLICY_PRESETS]
        else:
            raise ValueError(f"--compare {name!r} is none of {', '.join(COMPARISONS)}.")
    model_itself = System("model", model, policy)
    if model_itself not in [replace(system, name="model") for system in systems]:
        systems.append(model_itself)
    if len({system.name for system in systems}) < len(systems):
        raise ValueError(f"--compare names a system twice: {', '.join(system.name for system in systems)}.")
    return systems


def _base_of(model: str, config) -> str:
    base = getattr(config.base_config, "_name_or_path", "")
    if not base or (Path(base).is_absolute() and not Path(base).is_dir()):
        raise ValueError(f"The base of {model!r} is not at {base!r}; pass --compare base=PATH_OR_HUB_ID.")
    return base


def _stage1_of(model: str) -> str:
    """`safevlm train` and `safevlm demo` keep the stages' models beside the final one."""
    parent = Path(model).resolve().parent
    for output_dir in (parent, parent / "training", parent.parent):
        for stage in StageFolder.find(output_dir):
            if stage.number == 1 and stage.model.is_dir():
                return str(stage.model)
    raise ValueError(f"No stage-1 model beside {model!r}; pass --compare stage1=PATH.")
