"""The card: what it says is what the folder and the facts say, and nothing is made up."""

import json

import pytest

from safevlm import SafeVlmConfig
from safevlm.model_card import write_card

FACTS = {"model_name": "My SafeVLM", "base_model": "llava-hf/llava-1.5-7b-hf", "training_data": "12 rows"}
EVALUATION = {
    "data": "400 held-out questions",
    "command": "safevlm demo",
    "device": "2 CPU cores",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "date": "2026-01-02",
}
STAGES = [
    {"stage": "safety_alignment", "learning_rate": 1e-5, "num_train_epochs": 3},
    {"stage": "joint_finetuning", "learning_rate": 1e-5, "num_train_epochs": 3, "lora_r": 256},
]

CARD = """\
---
language: en
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- safevlm
- safety
- custom_code
---

# My SafeVLM

A vision-language model with [SafeVLM](https://arxiv.org/abs/2405.13581)'s safety modules: \
it answers, and says with each
answer which risk category and level the request has and how probable that is. A policy, saved with the model, decides
what follows (`allow`, `caution`, `warn`, `refuse`) and is enforced in `generate()`.

- **Base model:** llava-hf/llava-1.5-7b-hf
- **Training data:** 12 rows
- **Risk categories:** politics, illegal risk, insults and bullying, fairness, privacy, misleading, safe
- **Risk levels:** none, low, medium, high
- **Policy in force:** `default`: none → allow, low → caution, medium → warn, high → refuse; \
risky from a probability of 0.5; forced refusal

## Use

The model needs transformers, and its own code, which is in this repository: read it before you trust it.

```python
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="saved", trust_remote_code=True)
content = [{"type": "image", "image": "picture.png"}, {"type": "text", "text": "What is in the picture?"}]
answer = pipe(text=[{"role": "user", "content": content}], return_full_text=False)[0]
answer["generated_text"]  # the answer, or the refusal
answer["safety"]  # action, category, level, score, probabilities
```

## Evaluation

| % | base | stage2 |
|---|---:|---:|
| clean_accuracy | 99.2 | 97.5 |
| auroc | - | 99.9 |

On 400 held-out questions; `safevlm demo`, 2 CPU cores, torch 2.13.0, transformers 5.23.0, 2026-01-02.

## Training

| stage | learning_rate | num_train_epochs | lora_r |
|---|---|---|---|
| safety_alignment | 1e-05 | 3 | - |
| joint_finetuning | 1e-05 | 3 | 256 |

## Limits

- The verdict covers images with their question. A request without an image is not assessed.
- The head is as good as its training data. Risk categories it has not seen, other languages and adversarial images are
  not evaluated.
- Probabilities are not calibrated unless the policy says so (its temperatures are 1.0 and 1.0).

## Citation

```bibtex
@article{liu2024safety,
  title={Safety Alignment for Vision Language Models},
  author={Liu, Zhendong and Nie, Yuanbi and Tan, Yingshui and Yue, Xiangyu and Cui, Qiushi and Wang, Chongjun and
          Zhu, Xiaoyong and Zheng, Bo},
  journal={arXiv preprint arXiv:2405.13581},
  year={2024}
}
```
"""


@pytest.fixture
def saved(tmp_path):
    """`saved(**config)`: a model's folder, with its configuration only."""

    def make(**config):
        folder = tmp_path / "saved"
        SafeVlmConfig(**config).save_pretrained(folder)
        return folder

    return make


def test_the_whole_card(saved):
    metrics = {"base": {"clean_accuracy": 0.992}, "stage2": {"clean_accuracy": 0.975, "auroc": 0.9991}}
    path = write_card(saved(), {**FACTS, "metrics": metrics, "evaluation": EVALUATION, "stages": STAGES})
    assert path.name == "README.md"
    assert path.read_text(encoding="utf-8").rstrip("\n") == CARD.rstrip("\n")


def section(path, title: str) -> str:
    return path.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0].strip()


def test_what_was_not_measured_is_said_to_be_unknown(saved):
    path = write_card(saved(), FACTS)
    assert section(path, "Evaluation") == "Not evaluated."
    assert section(path, "Training") == "Not recorded."


def test_metrics_without_their_origin_are_refused(saved):
    folder = saved()
    with pytest.raises(ValueError, match="`metrics` need `evaluation`"):
        write_card(folder, {**FACTS, "metrics": {"base": {"auroc": 0.9}}})
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    "policy, line",
    [
        ("off", "`off`: off"),
        (
            "paper",
            "`paper`: none → allow, low → caution, medium → warn, high → refuse; risky from a probability of 0.5; "
            "refusal by hint",
        ),
        (
            "strict",
            "`strict`: none → allow, low → warn, medium → refuse, high → refuse; risky from a probability of 0.2; "
            "forced refusal",
        ),
    ],
)
def test_the_card_states_the_policy_in_force(saved, policy, line):
    path = write_card(saved(safety_policy=policy), FACTS)
    assert f"- **Policy in force:** {line}\n" in path.read_text(encoding="utf-8")


def test_calibration_of_the_policy_is_stated(saved):
    config = {"safety_policy": {"level_temperature": 1.5, "category_temperature": 0.8}}
    assert "its temperatures are 1.5 and 0.8" in write_card(saved(**config), FACTS).read_text(encoding="utf-8")


def test_a_licence_is_written_only_if_it_is_known(saved):
    folder = saved()
    assert "license" not in write_card(folder, FACTS).read_text(encoding="utf-8").split("---")[1]
    assert "license: mit\n" in write_card(folder, {**FACTS, "license": "mit"}).read_text(encoding="utf-8")


def test_a_model_without_configuration_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        write_card(tmp_path, FACTS)


def test_the_card_s_facts_come_from_the_folder(saved):
    names = {"category_names": ["risk", "safe"], "level_names": ["none", "some"]}
    config = {**names, "safety_policy": {"level_actions": {"some": "warn"}}}
    folder = saved(**config)
    assert json.loads((folder / "config.json").read_text())["category_names"] == ["risk", "safe"]
    text = write_card(folder, FACTS).read_text(encoding="utf-8")
    assert "- **Risk categories:** risk, safe\n- **Risk levels:** none, some\n" in text
    assert "none → allow, some → warn;" in text
