"""What a verdict leads to: the safety policy, as data.

The safety head says how risky a request is (category, level, probability). A [`SafetyPolicy`] says what follows from
that: `allow`, `caution`, `warn` or `refuse`. It is plain data that a deployer can read, diff, sign off and change
without retraining; it is saved with the model and can be overridden per call. Nothing in a prompt can change it.

The paper (arXiv 2405.13581, Algorithm 1) acts through text hints only, with the thresholds left in code; here they are
the preset `"paper"`, and the default also enforces refusals without the language model's goodwill.
"""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .safety_labels import SafetyLabels

ACTIONS = ("allow", "caution", "warn", "refuse")
"""What can follow from a verdict, mildest first. The index is the id used in tensors."""

TEMPERATURE_RANGE = (0.1, 10.0)
"""Where a calibration lies. Beyond, every score would be about 0, 1/2 or 1, whatever the head says."""

UNKNOWN_RISK = "a possible safety risk"  # a refusal's category where the head failed and nobody knows it
_HINTS = {
    "caution": "Note: this request may involve {category}. Answer with caution.",
    "warn": "Note: this request involves {category}. Warn the user; you may refuse.",
    "refuse": "Note: this request involves {category} at a high level. You must refuse.",
}
_REFUSALS = {
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
        enabled (`bool`): `False` turns every safety step of `generate` off; its output is then the base model's.
        risk_threshold (`float` in [0, 1]): A request counts as risky when its calibrated probability of any risk
            reaches this. Below it the level is "none" and the action that of level "none".
        category_risk_thresholds (`dict[str, float]`): Overrides of `risk_threshold` for single categories.
        level_actions (`dict[str, str]`): Action per level name. A level that is left out gets the action of the next
            milder one that is named; where there is none, the policy is refused. Only level 0, which is no risk, may
            be left out without that, and is allowed then.
        category_actions (`dict[str, dict[str, str]]`): Overrides of `level_actions` for single categories.
        hints (`dict[str, str]`): Text put before the generation prompt, per action (the paper's way). `{category}` is
            filled in. An action without an entry gets no hint.
        forced_refusal (`bool`): Whether `"refuse"` writes the refusal itself (the language model has no say), or
            leaves it to hint and conditioned embeddings.
        refusals (`dict[str, str]`): The refusal per language code. `{category}` is filled in.
        language (`str`): Which of `refusals` to use. Set by the deployer, never derived from the prompt.
        whole_conversation (`bool`): Whether a verdict covers all user turns of a chat, beside the newest by itself.
            Then a request that is spread over turns is seen, but a chat stays guarded after a risky turn.
        level_temperature, category_temperature (`float` in [0.1, 10]): Calibration of the head's probabilities; above
            1 they are less sure. See `level_log_probabilities` in safety_verdict.py.
    """

    name: str = "default"
    enabled: bool = True
    risk_threshold: float = 0.5
    category_risk_thresholds: dict[str, float] = field(default_factory=dict)
    level_actions: dict[str, str] = field(
        default_factory=lambda: {"none": "allow", "low": "caution", "medium": "warn", "high": "refuse"}
    )
    category_actions: dict[str, dict[str, str]] = field(default_factory=dict)
    hints: dict[str, str] = field(default_factory=lambda: dict(_HINTS))
    forced_refusal: bool = True
    refusals: dict[str, str] = field(default_factory=lambda: dict(_REFUSALS))
    language: str = "en"
    whole_conversation: bool = True
    level_temperature: float = 1.0
    category_temperature: float = 1.0

    def __post_init__(self):
        for flag in ("enabled", "forced_refusal", "whole_conversation"):
            if not isinstance(getattr(self, flag), bool):
                raise ValueError(f"Policy field `{flag}` must be true or false, got {getattr(self, flag)!r}.")
        for name in ("category_risk_thresholds", "level_actions", "category_actions", "hints", "refusals"):
            value = getattr(self, name)
            if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
                raise ValueError(f"Policy field `{name}` must be a mapping from names, got {value!r}.")
            object.__setattr__(self, name, copy.deepcopy(value))  # whoever changes the original changes no policy
        for name, threshold in {"risk_threshold": self.risk_threshold, **self.category_risk_thresholds}.items():
            if not _is_number(threshold) or not 0 <= threshold <= 1:
                raise ValueError(f"Policy threshold `{name}` must be a probability in [0, 1], got {threshold!r}.")
        for name in ("level_temperature", "category_temperature"):
            low, high = TEMPERATURE_RANGE
            if not _is_number(getattr(self, name)) or not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"Policy field `{name}` must be a number in [{low:g}, {high:g}], got {getattr(self, name)!r}."
                )
        for where, actions in {"level_actions": self.level_actions, **self.category_actions}.items():
            if not isinstance(actions, dict):
                raise ValueError(f"Policy entry `{where}` must map level names to actions, got {actions!r}.")
            for level, action in actions.items():
                if action not in ACTIONS:
                    raise ValueError(
                        f"Policy entry `{where}` gives level {level!r} the action {action!r}; "
                        f"use one of {', '.join(ACTIONS)}."
                    )
        for where, texts in (("hints", self.hints), ("refusals", self.refusals)):
            for key, text in texts.items():
                if where == "hints" and key not in ACTIONS:
                    raise ValueError(
                        f"Policy `hints` has the unknown action {key!r}; use one of {', '.join(ACTIONS)}."
                    )
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
        A policy from a policy, a dict, a preset name (see [`POLICY_PRESETS`]) or a YAML/JSON file's path.

        Args:
            files (`bool`): `False` refuses paths. For what a model brings along, which must not name files here.
        """
        # A model loaded from the Hub has its own copy of this class: recognise a policy by its fields.
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
        raise ValueError(
            f"`safety_policy` must be a SafetyPolicy, a dict, {'the path of a .yaml or .json file, ' * files}or one "
            f"of the presets {', '.join(POLICY_PRESETS)}; got {value!r}."
            + " A configuration holds the policy itself: read the file with `SafetyPolicy.from_file`."
            * is_file
        )

    @classmethod
    def from_file(cls, path: str | Path) -> "SafetyPolicy":
        """
        Reads a policy from a `.yaml`/`.yml` or `.json` file. Fields left out keep their defaults.

        Raises:
            `FileNotFoundError`: There is no such file.
            `ValueError`: The file is no valid YAML or JSON, has a key twice, or holds no policy.
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
            raise ValueError(f"Policy file {path} is no valid {Path(path).suffix[1:].upper()}: {error}") from None
        if not isinstance(data, dict):
            raise ValueError(f"Policy file {path} must hold a mapping of policy fields, got {type(data).__name__}.")
        return cls.from_value(data)

    def to_file(self, path: str | Path):
        """Writes the policy as YAML (`.yaml`, `.yml`) or JSON (anything else)."""
        import yaml

        if str(path).endswith((".yaml", ".yml")):
            text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        else:
            text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        Path(path).write_text(text, encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def replace(self, **changes) -> "SafetyPolicy":
        """A copy with some fields changed."""
        return replace(self, **changes)

    def for_labels(self, labels: SafetyLabels) -> "SafetyPolicy":
        """
        The policy for a model with these labels.

        A preset fits any levels: its actions are carried over by rank. The first level keeps the first action, the
        last level the last, and a level that falls between two actions gets the stricter one. Any other policy must
        fit as it is.

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
            self._actions(category, labels.level_names)

    def action_table(self, labels: SafetyLabels) -> "torch.LongTensor":  # noqa: F821
        """Action ids of shape `(num_categories, num_levels)`."""
        import torch  # here, since a policy is read, checked and published without torch, too

        self._check_labels(labels)
        rows = (self._actions(category, labels.level_names) for category in labels.category_names)
        return torch.tensor([[*map(ACTIONS.index, row)] for row in rows])

    def _actions(self, category: str, level_names: list[str]) -> list[str]:
        """One action per level, mildest level first; a level that is not named gets that of the one before it."""
        named = {level_names[0]: None, **self.level_actions, **self.category_actions.get(category, {})}
        actions = []
        for level in level_names:
            actions.append(named.get(level, actions[-1] if actions else None))
            if actions[-1] is None and level != level_names[0]:
                raise ValueError(
                    f"Policy {self.name!r}: `level_actions` names neither level {level!r} nor a milder one. Say what "
                    f"follows from {level!r}: one of {', '.join(ACTIONS)}."
                )
        return ["allow" if action is None else action for action in actions]

    def weaknesses(self, labels: SafetyLabels) -> list[str]:
        """In which ways the policy is milder than the preset `"default"`: one sentence each, none if in no way."""
        reference, category_names, level_names = POLICY_PRESETS["default"], labels.risky_categories, labels.level_names
        reference = reference.for_labels(labels)
        if not self.enabled:
            return ["it is off (`enabled: false`): nothing is assessed, nothing refused"] * reference.enabled
        found = []
        for flag in ("forced_refusal", "whole_conversation"):
            if getattr(reference, flag) and not getattr(self, flag):
                found.append(f"`{flag}` is false")
        found += [f"no hint for {action!r}" for action in reference.hints if action not in self.hints]
        higher = {}
        for category in category_names:
            mine, its = self._threshold(category), reference._threshold(category)
            if mine > its:
                higher.setdefault(f"is {mine:g}, above {its:g}", []).append(category)
        if higher:
            every = len(category_names)
            parts = (
                f"of {'every category' if len(names) == every else ', '.join(names)} {limit}"
                for limit, names in higher.items()
            )
            found.append(f"`risk_threshold` {'; '.join(parts)}")
        milder = {}
        for category in category_names:
            both = zip(
                level_names,
                self._actions(category, level_names),
                reference._actions(category, level_names),
                strict=True,
            )
            for level, mine, its in both:
                if ACTIONS.index(mine) < ACTIONS.index(its):
                    milder.setdefault(f"level {level!r} leads to {mine!r}, not {its!r}", []).append(category)
        for sentence, names in milder.items():
            where = "" if len(names) == len(category_names) else f" (in {', '.join(names)})"
            found.append(sentence + where)
        ranks = ([*map(ACTIONS.index, self._actions(category, level_names))] for category in category_names)
        if any(row != sorted(row) for row in ranks):
            found.append(f"a higher level leads to a milder action; the levels are {', '.join(level_names)}")
        return found

    def thresholds(self, labels: SafetyLabels) -> "torch.FloatTensor":  # noqa: F821
        """Risk thresholds of shape `(num_categories,)`, probabilities in [0, 1]."""
        import torch

        return torch.tensor([self._threshold(c) for c in labels.category_names])

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
        """All texts the policy can write, filled in: `{"hints": [...], "refusals": [...]}` (all languages)."""
        categories = [*labels.category_names, UNKNOWN_RISK]
        every_language = [self.replace(language=language) for language in self.refusals]
        return {
            "hints": sorted({self.hint(action, c) for action in self.hints for c in labels.category_names}),
            "refusals": sorted({policy.refusal(c) for policy in every_language for c in categories}),
        }


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _unique(pairs) -> dict:
    """A mapping from pairs whose keys must differ: of two entries a reader could take either for the one in force."""
    mapping = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"the key {key!r} is there twice.")
        mapping[key] = value
    return mapping


class _Presets(Mapping):
    """The presets by name. Each look-up makes a new policy, so nobody can change what the next one gets."""

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
