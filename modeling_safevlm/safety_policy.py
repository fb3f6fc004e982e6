"""What follows from a verdict: the safety policy, as data.

The safety head says how risky a request is: category, level and probability. A [`SafetyPolicy`] says what follows:
`allow`, `caution`, `warn` or `refuse`. It is plain data that a deployer can read, compare and sign off, and change
without retraining. It is saved with the model, each call can override it, and nothing in a prompt can change it.

The paper (arXiv 2405.13581, Algorithm 1) acts through text hints only, with its thresholds in code. That is the preset
`"paper"` here; the preset `"default"` also writes refusals itself, whatever the language model would say.
"""

import copy
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .safety_labels import SafetyLabels

ACTIONS = ("allow", "caution", "warn", "refuse")
"""What can follow from a verdict, mildest first. The index is the id used in tensors."""

TEMPERATURE_RANGE = (0.1, 10.0)
"""Bounds of a calibration. Beyond them every score is about 0, 1/2 or 1, whatever the head says."""

UNKNOWN_RISK = "a possible safety risk"  # named in a refusal when the head failed, so that there is no category
_LEVEL_ACTIONS = {"none": "allow", "low": "caution", "medium": "warn", "high": "refuse"}
_HINTS = {
    "caution": "Note: this request may involve {category}. Answer with caution.",
    "warn": "Note: this request involves {category}. Warn the user; you may refuse.",
    "refuse": "Note: this request involves {category} at a high level. You must refuse.",
}
_REFUSALS = {  # category names are English, so only the English text has them
    "en": "I can't help with this request: it involves {category}.",
    "de": "Dabei kann ich nicht helfen.",
    "es": "No puedo ayudar con esta solicitud.",
    "fr": "Je ne peux pas répondre à cette demande.",
    "zh": "抱歉，我无法协助处理这个请求。",
}


@dataclass(frozen=True)
class SafetyPolicy:
    """
    Maps a verdict to an action and says how the action is carried out.

    Args:
        name (`str`): Name shown in reports.
        enabled (`bool`): `False` turns off every safety step of `generate`: the answer is then the base model's.
        risk_threshold (`float` in [0, 1]): A request is risky if its calibrated probability of any risk reaches this
            value. Otherwise its level is "none" and it gets the action of that level.
        category_risk_thresholds (`dict[str, float]`): Overrides of `risk_threshold` for single categories.
        level_actions (`dict[str, str]`): Action per level name. A level that is left out gets the action of the next
            milder level that is named; if there is none, the policy is refused. Level 0 ("no risk") may always be
            left out and is then allowed.
        category_actions (`dict[str, dict[str, str]]`): Overrides of `level_actions` for single categories.
        hints (`dict[str, str]`): Text put before the generation prompt, per action, as in the paper. `{category}` is
            filled in. An action without an entry gets no hint.
        forced_refusal (`bool`): Whether `"refuse"` writes the refusal itself, without the language model, or only
            asks for one through the hint and the conditioned embeddings.
        refusals (`dict[str, str]`): The refusal per language code. `{category}` is filled in.
        language (`str`): Which of `refusals` to use. Set by the deployer, never derived from the prompt.
        whole_conversation (`bool`): Whether a verdict also covers all user turns of a chat, not only the newest. This
            catches a request that is spread over several turns, but a chat stays guarded after a risky turn.
        level_temperature, category_temperature (`float` in [0.1, 10]): Calibration of the head; values above 1 soften
            the probabilities. See `level_log_probabilities` in safety_verdict.py.
    """

    name: str = "default"
    enabled: bool = True
    risk_threshold: float = 0.5
    category_risk_thresholds: dict[str, float] = field(default_factory=dict)
    level_actions: dict[str, str] = field(default_factory=_LEVEL_ACTIONS.copy)
    category_actions: dict[str, dict[str, str]] = field(default_factory=dict)
    hints: dict[str, str] = field(default_factory=_HINTS.copy)
    forced_refusal: bool = True
    refusals: dict[str, str] = field(default_factory=_REFUSALS.copy)
    language: str = "en"
    whole_conversation: bool = True
    level_temperature: float = 1.0
    category_temperature: float = 1.0

    def __post_init__(self):
        self._check_types()
        self._check_numbers()
        self._check_actions()
        self._check_texts()

    def _check_types(self):
        for name in ("enabled", "forced_refusal", "whole_conversation"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Policy field `{name}` must be true or false, got {getattr(self, name)!r}.")
        for name in ("category_risk_thresholds", "level_actions", "category_actions", "hints", "refusals"):
            value = getattr(self, name)
            if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
                raise ValueError(f"Policy field `{name}` must be a mapping from names, got {value!r}.")
            object.__setattr__(self, name, copy.deepcopy(value))  # later changes of the original change no policy

    def _check_numbers(self):
        for name, threshold in {"risk_threshold": self.risk_threshold, **self.category_risk_thresholds}.items():
            if not _is_number(threshold) or not 0 <= threshold <= 1:
                raise ValueError(f"Policy threshold `{name}` must be a probability in [0, 1], got {threshold!r}.")
        low, high = TEMPERATURE_RANGE
        for name in ("level_temperature", "category_temperature"):
            temperature = getattr(self, name)
            if not _is_number(temperature) or not low <= temperature <= high:
                raise ValueError(
                    f"Policy field `{name}` must be a number in [{low:g}, {high:g}], got {temperature!r}."
                )

    def _check_actions(self):
        for where, actions in {"level_actions": self.level_actions, **self.category_actions}.items():
            if not isinstance(actions, dict):
                raise ValueError(f"Policy entry `{where}` must map level names to actions, got {actions!r}.")
            for level, action in actions.items():
                if action not in ACTIONS:
                    raise ValueError(
                        f"Policy entry `{where}` gives level {level!r} the action {action!r}; "
                        f"use one of {', '.join(ACTIONS)}."
                    )

    def _check_texts(self):
        if unknown := [action for action in self.hints if action not in ACTIONS]:
            raise ValueError(f"Policy `hints` has the unknown action {unknown[0]!r}; use one of {', '.join(ACTIONS)}.")
        for where, texts in (("hints", self.hints), ("refusals", self.refusals)):
            for key, text in texts.items():
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(f"Policy `{where}` entry {key!r} must be a non-empty text, got {text!r}.")
        if self.language not in self.refusals:
            raise ValueError(
                f"Policy language {self.language!r} has no refusal text; add `refusals[{self.language!r}]` or use one "
                f"of {', '.join(sorted(self.refusals))}."
            )

    @classmethod
    def from_value(cls, value: "SafetyPolicy | dict | str | Path", files: bool = True) -> "SafetyPolicy":
        """
        A policy from a policy, a dict, a preset name (see [`POLICY_PRESETS`]) or the path of a YAML or JSON file.

        Args:
            files (`bool`): `False` refuses paths: what is saved with a model must not name files on this machine.
        """
        # A model loaded from the Hub has its own copy of this class, so compare names.
        if isinstance(value, cls) or type(value).__name__ == cls.__name__:
            return value if isinstance(value, cls) else cls(**asdict(value))
        if isinstance(value, dict):
            known = {f.name for f in fields(cls)}
            if unknown := sorted(set(value) - known):
                raise ValueError(
                    f"Unknown policy field(s) {', '.join(map(repr, unknown))}; known: {', '.join(sorted(known))}."
                )
            return cls(**value)
        if isinstance(value, str) and value in POLICY_PRESETS:
            return POLICY_PRESETS[value]
        is_file = isinstance(value, Path) or (isinstance(value, str) and value.endswith((".yaml", ".yml", ".json")))
        if files and is_file:
            return cls.from_file(value)
        path, presets = "the path of a .yaml or .json file, " if files else "", ", ".join(POLICY_PRESETS)
        message = (
            f"`safety_policy` must be a SafetyPolicy, a dict, {path}or one of the presets {presets}; got {value!r}."
        )
        if is_file:
            message += " A configuration holds the policy itself: read the file with `SafetyPolicy.from_file`."
        raise ValueError(message)

    @classmethod
    def from_file(cls, path: str | Path) -> "SafetyPolicy":
        """
        Reads a policy from a `.yaml`, `.yml` or `.json` file. Fields that are left out keep their defaults.

        Raises:
            `FileNotFoundError`: The file does not exist.
            `ValueError`: The file is not valid YAML or JSON, has a key twice, or does not hold a policy.
        """
        import yaml

        class Loader(yaml.SafeLoader):
            def construct_mapping(self, node, deep=False):
                _unique((str(key.value), None) for key, _ in node.value)
                return super().construct_mapping(node, deep)

        try:
            text = Path(path).read_text(encoding="utf-8")
            if str(path).endswith(".json"):
                data = json.loads(text, object_pairs_hook=_unique)
            else:
                data = yaml.load(text, Loader)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"Policy file {path} does not exist; write it, or use a preset: {', '.join(POLICY_PRESETS)}."
            ) from None
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise ValueError(f"Policy file {path} is not valid {Path(path).suffix[1:].upper()}: {error}") from None
        if not isinstance(data, dict):
            raise ValueError(f"Policy file {path} must hold a mapping of policy fields, got {type(data).__name__}.")
        return cls.from_value(data)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def replace(self, **changes) -> "SafetyPolicy":
        """A copy with some fields changed."""
        return replace(self, **changes)

    def for_labels(self, labels: SafetyLabels) -> "SafetyPolicy":
        """
        The policy for a model with these labels.

        The `level_actions` of a preset fit any levels, by rank: the first level keeps the first action, the last level
        the last, and a level that falls between two actions gets the stricter one. Others must fit as they are.

        Raises:
            `ValueError`: The policy names a level or category that the model does not have, or too few levels.
        """
        known = list(self.level_actions)
        presets = [preset.level_actions for preset in POLICY_PRESETS.values()]
        if set(known) <= set(labels.level_names) or self.level_actions not in presets:
            self._check_labels(labels)
            return self
        steps = (len(known) - 1) / (len(labels.level_names) - 1)
        actions = {name: self.level_actions[known[math.ceil(i * steps)]] for i, name in enumerate(labels.level_names)}
        return self.replace(level_actions=actions).for_labels(labels)

    def _check_labels(self, labels: SafetyLabels):
        for where, names, known in (
            ("level_actions", self.level_actions, labels.level_names),
            ("category_actions", self.category_actions, labels.category_names),
            ("category_risk_thresholds", self.category_risk_thresholds, labels.category_names),
            *((f"category_actions[{c!r}]", levels, labels.level_names) for c, levels in self.category_actions.items()),
        ):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(
                    f"Policy {self.name!r}: `{where}` names {', '.join(map(repr, unknown))}, which this model does "
                    f"not have. It has: {', '.join(known)}."
                )
        for category in labels.category_names:
            self._actions(category, labels)

    def action_table(self, labels: SafetyLabels) -> "torch.LongTensor":  # noqa: F821
        """Action ids of shape `(num_categories, num_levels)`."""
        import torch  # only here, so that policies can be read, checked and published without torch

        self._check_labels(labels)
        return torch.tensor([self._actions(category, labels) for category in labels.category_names])

    def thresholds(self, labels: SafetyLabels) -> "torch.FloatTensor":  # noqa: F821
        """Risk thresholds of shape `(num_categories,)`, probabilities in [0, 1]."""
        import torch

        return torch.tensor([self._threshold(category) for category in labels.category_names])

    def weaknesses(self, labels: SafetyLabels) -> list[str]:
        """In which ways the policy is milder than the preset `"default"`, one sentence each; empty if it is not."""
        if not self.enabled:
            return ["it is off (`enabled: false`): nothing is assessed, nothing refused"]
        default = POLICY_PRESETS["default"].for_labels(labels)
        found = [f"`{flag}` is false" for flag in ("forced_refusal", "whole_conversation") if not getattr(self, flag)]
        found += [f"no hint for {action!r}" for action in default.hints if action not in self.hints]
        higher, milder, unordered = defaultdict(list), defaultdict(list), False  # weakness -> its categories
        for category in labels.risky_categories:
            threshold, usual_threshold = self._threshold(category), default._threshold(category)
            if threshold > usual_threshold:
                higher[f"is {threshold:g}, above {usual_threshold:g}"].append(category)
            actions, usual_actions = self._actions(category, labels), default._actions(category, labels)
            for level, action, usual in zip(labels.level_names, actions, usual_actions, strict=True):
                if action < usual:
                    milder[f"level {level!r} leads to {ACTIONS[action]!r}, not {ACTIONS[usual]!r}"].append(category)
            unordered |= actions != sorted(actions)
        risky = labels.risky_categories
        limits = [f"of {'every category' if c == risky else ', '.join(c)} {limit}" for limit, c in higher.items()]
        found += [f"`risk_threshold` {'; '.join(limits)}"] if limits else []
        found += [what if c == risky else f"{what} (in {', '.join(c)})" for what, c in milder.items()]
        if unordered:
            found.append(f"a higher level leads to a milder action; the levels are {', '.join(labels.level_names)}")
        return found

    def _actions(self, category: str, labels: SafetyLabels) -> list[int]:
        """One action id per level, mildest level first. A level that is not named gets that of the level before it."""
        named = {**self.level_actions, **self.category_actions.get(category, {})}
        action, ids = None, []
        for level in labels.level_names:
            action = named.get(level, action)
            if action is None and level != labels.level_names[0]:
                raise ValueError(
                    f"Policy {self.name!r}: `level_actions` names neither level {level!r} nor a milder one. Say what "
                    f"follows from {level!r}: one of {', '.join(ACTIONS)}."
                )
            ids.append(ACTIONS.index(action or "allow"))
        return ids

    def _threshold(self, category: str) -> float:
        return float(self.category_risk_thresholds.get(category, self.risk_threshold))

    def hint(self, action: str, category: str) -> str | None:
        """The hint for the language model, or `None`."""
        text = self.hints.get(action)
        return None if text is None else text.replace("{category}", category)

    def refusal(self, category: str) -> str:
        """The text of a forced refusal."""
        return self.refusals[self.language].replace("{category}", category)

    def texts(self, labels: SafetyLabels) -> dict[str, list[str]]:
        """Every text the policy can write, filled in, in all languages: `{"hints": [...], "refusals": [...]}`."""
        names = (*labels.category_names, UNKNOWN_RISK)
        refusals = {text.replace("{category}", name) for text in self.refusals.values() for name in names}
        hints = {self.hint(action, name) for action in self.hints for name in labels.category_names}
        return {"hints": sorted(hints), "refusals": sorted(refusals)}


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _unique(pairs) -> dict:
    """A mapping from pairs. Refuses a repeated key: a reader could take either of the two entries to be in force."""
    mapping = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"the key {key!r} occurs twice.")
        mapping[key] = value
    return mapping


class _Presets(Mapping):
    """The presets by name. Each look-up makes a new policy, so that nobody can change a preset for others."""

    _fields = {
        "default": {},
        "paper": {"forced_refusal": False},
        "strict": {
            "risk_threshold": 0.2,
            "level_actions": {"none": "allow", "low": "warn", "medium": "refuse", "high": "refuse"},
        },
        "off": {"enabled": False},
    }

    def __getitem__(self, name: str) -> SafetyPolicy:
        return SafetyPolicy(name=name, **self._fields[name])

    def __iter__(self):
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


POLICY_PRESETS = _Presets()
