"""The trainer alone, as people use TRL's: it freezes, adds LoRA, merges, saves, restores the best and resumes."""

import json

import pytest
import torch
from tiny import safe_model, tiny_llava
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from safevlm import SafeVlmForConditionalGeneration
from safevlm.trainer import SafeVlmTrainer

LORA = dict(stage="joint_finetuning", lora_r=4)
STAGES = {"stage 1": dict(stage="safety_alignment"), "stage 2": dict(stage="joint_finetuning"), "LoRA": LORA}


def test_the_model_is_prepared_before_training_starts(fresh_model, make_trainer, rows):
    model = fresh_model()
    make_trainer(model, rows)
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"safety"}
    trainer = make_trainer(fresh_model(), rows, **LORA)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert any(".lora_A." in name for name in trained) and any(".safety." in name for name in trained)
    assert all(".lora_" in name or ".safety." in name for name in trained)


@pytest.mark.parametrize("stage", STAGES)
def test_the_model_that_was_passed_is_the_plain_trained_one(
    fresh_model, make_trainer, rows, weights, differing, stage
):
    model = fresh_model()
    model.base.lm_head.weight.requires_grad = False
    before = weights(model)
    trainer = make_trainer(model, rows, **STAGES[stage])
    trainer.train()
    assert trainer.model is model and type(model) is SafeVlmForConditionalGeneration
    changed = differing(before, weights(model))
    assert changed and any(name.startswith("base.") for name in changed) == (stage != "stage 1")
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["base.lm_head.weight"]  # as it came
    assert not model.training


def test_without_training_rows_nothing_of_the_model_changes(fresh_model, make_trainer, rows, weights, differing):
    model = fresh_model()
    before = weights(model)
    trainer = make_trainer(model, eval_dataset=rows, **LORA)
    trainer.evaluate()
    assert trainer.model is model and all(parameter.requires_grad for parameter in model.parameters())
    assert not differing(before, weights(model))
    with pytest.raises(ValueError, match="`train_dataset` is missing"):
        trainer.train()


@pytest.mark.parametrize("stage", STAGES)
def test_what_save_model_writes_loads_and_is_the_trained_model(
    fresh_model, make_trainer, rows, batch, tmp_path, weights, differing, stage
):
    trainer = make_trainer(fresh_model(), rows, **STAGES[stage])
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    trainer.save_model()
    for folder in (tmp_path / "saved", tmp_path / "stage"):
        loaded = SafeVlmForConditionalGeneration.from_pretrained(folder)
        assert not differing(weights(loaded), weights(trainer.model))
        assert not list(folder.glob("*.bin")) and (folder / "processor_config.json").is_file()
    adapter = tmp_path / "stage" / "adapter" / "adapter_model.safetensors"
    assert adapter.is_file() == (stage == "LoRA")


def test_saving_in_the_middle_of_a_lora_training_saves_a_merged_copy(fresh_model, make_trainer, rows, batch, tmp_path):
    trainer = make_trainer(fresh_model(), rows, **LORA)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trainer.save_model(tmp_path / "saved")
    loaded = SafeVlmForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).logits, trainer.model.eval()(**batch).logits, atol=1e-4)
    assert any("lora_A" in name for name, _ in trainer.model.named_parameters())  # it goes on
    trainer.train()


def test_training_again_goes_on_from_the_trained_weights(fresh_model, make_trainer, rows, weights, differing):
    model = fresh_model()
    trainer = make_trainer(model, rows, **LORA)
    trainer.train()
    first = weights(model)
    trainer.train()
    assert trainer.model is model and differing(first, weights(model))


@pytest.mark.parametrize("stage", STAGES)
def test_a_trainer_that_cannot_be_made_leaves_the_model_as_it_was(
    fresh_model, make_trainer, rows, weights, differing, stage
):
    model = fresh_model()
    before = weights(model)
    with pytest.raises(ValueError, match="eval_dataset"):
        make_trainer(model, rows, eval_strategy="epoch", **STAGES[stage])
    assert not differing(before, weights(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


# -- checkpoints


@pytest.mark.parametrize("stage", STAGES)
def test_the_best_checkpoint_is_restored_whole(fresh_model, make_trainer, rows, weights, differing, stage):
    """The learning rate is so high that the first evaluation is the best."""
    kept = {}

    class Keep(EarlyStoppingCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
            kept[state.global_step] = metrics["eval_safety_level_loss"]

    trainer = make_trainer(
        fresh_model(),
        rows,
        rows,
        callbacks=[Keep(early_stopping_patience=2)],
        max_steps=12,
        learning_rate=0.3,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="safety_level_loss",
        **STAGES[stage],
    )
    trainer.train()
    best = min(kept, key=kept.get)
    assert trainer.state.best_global_step == best < trainer.state.global_step < 12  # it stopped early, too
    assert trainer.evaluate()["eval_safety_level_loss"] == pytest.approx(kept[best], rel=1e-4)
    if stage != "LoRA":
        folder = f"{trainer.args.output_dir}/checkpoint-{best}"
        expected = SafeVlmForConditionalGeneration.from_pretrained(folder)
        assert not differing(weights(trainer.model), weights(expected))


@pytest.mark.parametrize("stage", STAGES)
def test_resuming_ends_with_the_weights_of_a_run_without_a_break(
    fresh_model, make_trainer, rows, weights, differing, stage, tmp_path, monkeypatch
):
    settings = dict(
        **STAGES[stage],
        max_steps=5,
        save_strategy="steps",
        save_steps=1,
        lr_scheduler_type="cosine",
        hint_probability=0.5,
    )
    whole = make_trainer(fresh_model(), rows, output_dir=str(tmp_path / "whole"), **settings)
    whole.train()

    class Killed(BaseException):
        pass

    training_step = SafeVlmTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise Killed
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SafeVlmTrainer, "training_step", step)
        with pytest.raises(Killed):
            make_trainer(fresh_model(), rows, **settings).train()
    (tmp_path / "stage" / "checkpoint-4" / "trainer_state.json").unlink()  # its writing was cut off
    torch.manual_seed(99)
    resumed = make_trainer(fresh_model(), rows, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert [log["step"] for log in resumed.state.log_history if "train_loss" in log] == [5]
    assert not differing(weights(resumed.model), weights(whole.model))


def test_checkpoints_of_weights_alone_are_not_resumed_from(fresh_model, make_trainer, rows, tmp_path):
    settings = dict(save_strategy="steps", save_steps=1, save_only_model=True)
    make_trainer(fresh_model(), rows, **settings).train()
    assert (tmp_path / "stage" / "checkpoint-1").is_dir()
    for asked in (True, tmp_path / "stage" / "checkpoint-1"):
        with pytest.raises(ValueError, match="complete checkpoint to resume from.*`save_only_model`"):
            make_trainer(fresh_model(), rows, **settings).train(resume_from_checkpoint=asked)


def test_a_model_in_the_middle_of_a_lora_training_is_not_saved_as_if_it_was_plain(
    fresh_model, make_trainer, rows, tmp_path
):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model = fresh_model()
    trainer = make_trainer(model, rows, callbacks=[Stop()], **LORA)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(ValueError, match=r"Save it with `trainer.save_model\(folder\)`"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    trainer.save_model(tmp_path / "saved")
    SafeVlmForConditionalGeneration.from_pretrained(tmp_path / "saved")


def test_resuming_without_a_checkpoint_is_an_error(fresh_model, make_trainer, rows):
    with pytest.raises(ValueError, match="No complete checkpoint to resume from in"):
        make_trainer(fresh_model(), rows).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("recipe", ["demo", "paper"])
def test_every_shipped_recipe_keeps_checkpoints(recipe):
    from safevlm.trainer import Recipe

    for stage in Recipe.load(recipe).stages:
        assert stage["save_strategy"] == "steps" and stage["save_total_limit"] == 1
        assert stage["save_steps"] < stage.get("max_steps", 1000)


# -- what is passed


def test_other_arguments_models_and_processors_are_refused_by_name(
    fresh_model, make_trainer, arguments, processor, rows, tmp_path
):
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="`args` must be SafeVlmTrainingArguments.*got TrainingArguments"):
        SafeVlmTrainer(model=fresh_model(), args=plain, train_dataset=rows, processing_class=processor)
    with pytest.raises(ValueError, match="`args` must be SafeVlmTrainingArguments.*got NoneType"):
        SafeVlmTrainer(model=fresh_model(), train_dataset=rows, processing_class=processor)
    wrapped = make_trainer(fresh_model(), rows, **LORA).model
    with pytest.raises(ValueError, match="`model` already has PEFT adapters; pass the plain model"):
        make_trainer(wrapped, rows, **LORA)
    with pytest.raises(ValueError, match="`model` must be a SafeVlmForConditionalGeneration.*LlavaFor"):
        make_trainer(tiny_llava(), rows)
    with pytest.raises(ValueError, match="`processing_class` must be the model's SafeVlmProcessor"):
        SafeVlmTrainer(model=fresh_model(), args=arguments(), processing_class=processor.tokenizer)


def test_the_hub_gets_the_merged_model_with_a_card(hub, make_trainer, rows, processor, tmp_path, weights, differing):
    model = safe_model(tiny_llava(), processor)
    trainer = make_trainer(
        model, rows, **LORA, push_to_hub=True, hub_model_id="me/tuned", save_strategy="steps", save_steps=1
    )
    trainer.train()
    trainer.push_to_hub()
    files = hub.repo("me/tuned").files
    assert {"model.safetensors", "config.json", "modeling_safevlm.py", "README.md"} <= set(files)
    assert not {"adapter_config.json", "adapter_model.safetensors", "training_args.bin"} & set(files)
    loaded = SafeVlmForConditionalGeneration.from_pretrained("me/tuned")
    assert not differing(weights(loaded), weights(model))
    facts = json.loads((tmp_path / "stage" / "card_facts.json").read_text())
    assert facts["training"]["rows"] == 8 and facts["training"]["stages"][0]["stage"] == "joint_finetuning"
