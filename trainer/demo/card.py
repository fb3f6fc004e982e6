"""The model card of the demo's model."""

import shutil
from pathlib import Path

from safevlm.files import file_sha256
from safevlm.model_card import write_card
from safevlm.model_card.facts import policy_mark
from safevlm.safety_labels import PAPER_LABELS
from safevlm.trainer.card_facts import model_facts, row_counts, stage_facts
from safevlm.trainer.card_results import card_measures, origin
from safevlm.trainer.data import SafetyRow
from safevlm.trainer.evaluation.measure_table import Measure, head_measures
from safevlm.trainer.recipe import Recipe

CARD_MEASURES = (
    *(Measure(f"refusal_rate_level{level}", "safety") for level in (1, 2, 3)),
    Measure("comply_rate_risky", "safety", higher_is_better=False),
    Measure("pair_accuracy_risky", "safety"),
    Measure("over_refusal_rate_clean", "over-refusal", higher_is_better=False),
    Measure("over_refusal_rate_lookalike", "over-refusal", higher_is_better=False),
    Measure("pair_accuracy_benign", "general ability"),
    Measure("clean_accuracy", "general ability"),
    *head_measures("card"),
)
"""What [`summarise`] measures, as the card shows it."""


def write_demo_card(output_dir: Path, results: dict, recipe: Recipe, rows: list[SafetyRow], policy: dict, fast: bool):
    """
    Writes the card of `output_dir/model`, with the picture sheet.

    Args:
        output_dir (`Path`): The demo's, with `base/`, `model/`, `training/` and `sheet.png`.
        results (`dict`): As in `results.json`.
        rows (`list[SafetyRow]`): All training rows.
        policy (`dict`): The policy that the model was tested under.
    """
    model_dir = output_dir / "model"
    command = f"safevlm demo --seed {results['seed']}{' --fast' if fast else ''}"
    base = {
        "name": "picture-world-llava",
        "about": "a LLaVA of about a million parameters, built and trained on the spot to answer everything",
        "files": {"model.safetensors": file_sha256(output_dir / "base" / "model.safetensors")},
    }
    training = {
        "command": command,
        "about": "Drawn scenes of a small picture world with questions about them, risky ones among them; see "
        "safevlm.trainer.demo. This model shows the method at work. It knows nothing of the real world.",
        "rows": len(rows),
        **row_counts(rows, PAPER_LABELS),
        "stages": stage_facts(output_dir / "training", recipe.with_arguments(seed=results["seed"])),
    }
    data = f"{results['num_test_rows']} questions about held-out scenes of the picture world"
    result = {
        "title": "Held-out scenes of the picture world",
        "system": "stage2",
        "measures": card_measures(results["metrics"], CARD_MEASURES),
        **origin(results["environment"], data, command, policy_mark(policy)),
    }
    (model_dir / "plots").mkdir(exist_ok=True)
    shutil.copyfile(output_dir / "sheet.png", model_dir / "plots" / "sheet.png")
    sheet = {"file": "plots/sheet.png", "title": "What the base, stage 1 and stage 2 answer about the same scenes"}
    write_card(model_dir, {**model_facts("SafeVLM demo", base, training, [result]), "plots": [sheet]})
