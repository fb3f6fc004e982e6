"""A policy as a file that a deployer can read and sign off. Reading one is `SafetyPolicy.from_file`."""

import json
from pathlib import Path

import yaml

from .files import replace_text
from .safety_policy import SafetyPolicy


def write_policy(policy: SafetyPolicy, path: str | Path):
    """Writes the policy as YAML (`.yaml`, `.yml`) or JSON (any other ending)."""
    if str(path).endswith((".yaml", ".yml")):
        text = policy_yaml(policy)
    else:
        text = json.dumps(policy.to_dict(), indent=2, ensure_ascii=False) + "\n"
    replace_text(path, text)


def policy_yaml(policy: SafetyPolicy) -> str:
    """The policy as YAML."""
    return yaml.safe_dump(policy.to_dict(), sort_keys=False, allow_unicode=True)
