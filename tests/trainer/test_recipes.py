"""Recipes: the shipped ones say what they should, bad ones say what is wrong."""

import pytest
import torch
import yaml

from safevlm import SafeVlmConfig
from safevlm.trainer import Recipe, SafeVlmTrainingArguments

STAGE = {"stage": "safety_alignment", "learning_rate": 0.1}


def test_the_paper_s_recipe_has_the_numbers_of_its_table():
    first, second = Recipe.load("paper").stages
    shared = {"learning_rate": 1e-5, "num_train_epochs": 3, "per_device_train_batch_size": 2, "bf16": True}
    assert first.items() >= {**shared, "warmup_steps": 20, "gradient_accumulation_steps": 16}.items()
    assert second.items() >= {**shared, "warmup_steps": 300, "gradient_accumulation_steps": 8}.items()
    assert second.items() >= {"lora_r": 256, "lora_alpha": 16, "lora_dropout": 0.05}.items()
    assert (first["stage"], second["stage"]) == ("safety_alignment", "joint_finetuning")
    assert "lora_r" not in first and "trainable" not in first and "trainable" not in second


def test_the_paper_s_recipe_has_the_paper_s_sizes():
    sizes = SafeVlmConfig(**Recipe.load("paper").safety)
    paper = SafeVlmConfig.paper()
    for name in ("safety_hidden_size", "num_head_tokens", "num_prompt_tokens", "num_projected_tokens"):
        assert getattr(sizes, name) == getattr(paper, name), name
    assert (sizes.num_head_tokens, sizes.num_prompt_tokens, sizes.num_attention_heads) == (64, 64, 8)
    assert (sizes.safety_level_loss_coef, sizes.safety_category_loss_coef) == (10, 10)


@pytest.mark.parametrize("name", ["paper", "demo"])
def test_shipped_recipes_make_training_arguments(name, tmp_path):
    for stage in Recipe.load(name).stages:
        args = SafeVlmTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **stage)
        assert args.label_names == ["labels", "safety_level_labels", "safety_category_labels"]
        assert args.trainable == (["safety"] if args.stage == "safety_alignment" else ["safety", "language_model"])
        assert args.uses_lora == (name == "paper" and args.stage == "joint_finetuning")


@pytest.fixture
def load(tmp_path):
    """`load(value_or_text)`: as a recipe file."""

    def write_and_load(value):
        path = tmp_path / "mine.yaml"
        path.write_text(value if isinstance(value, str) else yaml.safe_dump(value), encoding="utf-8")
        return Recipe.load(path)

    return write_and_load


def test_a_recipe_file_is_read(load):
    recipe = load({"safety": {"num_head_tokens": 3}, "stages": [STAGE]})
    assert (recipe.stages, recipe.safety) == ([STAGE], {"num_head_tokens": 3})
    assert load({"stages": [STAGE]}).safety == {}


@pytest.mark.parametrize(
    "value, message",
    [
        ("", "`stages` must be a list with at least one stage"),
        ("- a", "`stages` must be a list with at least one stage"),
        ({"stages": []}, "`stages` must be a list with at least one stage"),
        ({"stages": {"stage": "safety_alignment"}}, "`stages` must be a list"),
        ({"stages": [STAGE], "model": 1, "data": 2}, "unknown entries data, model; use `stages` and `safety`"),
        ({"stages": [STAGE, {"stage": "third"}]}, "stage 2: `stage` must be one of .*, got 'third'"),
        ({"stages": [{}]}, "stage 1: `stage` must be one of .*, got None"),
        ({"stages": ["safety_alignment"]}, "stage 1: `stage` must be one of .*, got 'safety_alignment'"),
        ({"stages": [{**STAGE, "lr": 1}]}, "stage 1: unknown training arguments lr"),
        ({"stages": [STAGE], "safety": {"tokens": 1}}, "`safety`: unknown fields tokens"),
        ({"stages": [STAGE], "safety": [1]}, "`safety` must map fields of SafeVlmConfig to values"),
        (
            "stages:\n- stage: safety_alignment\n  learning_rate: fast\n",
            "`learning_rate` must be a number, got 'fast'",
        ),
        ({"stages": [{**STAGE, "output_dir": "x"}]}, "stage 1: leave out `output_dir`"),
        ({"stages": [{**STAGE, "bf16": "auto"}]}, "`bf16` must be true or false, got 'auto'"),
        ("stages: [", "is not valid YAML"),
    ],
)
def test_a_bad_recipe_says_where_and_what(load, value, message):
    with pytest.raises(ValueError, match=rf"mine\.yaml.*{message}"):
        load(value)


@pytest.mark.parametrize("name", ["papper", "missing.yaml", "../paper"])
def test_an_unknown_recipe_lists_the_shipped_ones(name):
    with pytest.raises(ValueError, match=rf"Recipe '{name}' not found; use a .yaml file or one of: demo, paper"):
        Recipe.load(name)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"learning_rat": 1}, "unknown training arguments learning_rat"),
        ({"stage": "safety_alignment"}, "`stage` cannot be the same for all stages"),
        ({"output_dir": "x"}, "`output_dir` cannot be the same for all stages"),
        ({"max_steps": True}, "`max_steps` must be a number, got True"),
    ],
)
def test_bad_overrides_of_all_stages_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        Recipe([STAGE]).with_arguments(**overrides)


def test_a_bf16_recipe_trains_on_the_cpu(fresh_model, rows, make_trainer):
    model = fresh_model()
    make_trainer(model, rows, bf16=True, max_steps=2).train()
    assert model.dtype == torch.float32  # mixed precision: the weights stay as they are
    assert all(parameter.isfinite().all() for parameter in model.safety.parameters())


def test_a_bf16_recipe_without_a_gpu_says_to_assign_the_cpu(arguments):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(ValueError, match="You need to assign use_cpu"):
        arguments(bf16=True, use_cpu=False)
