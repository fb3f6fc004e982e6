"""SafeVlmTrainer: transformers' `Trainer` for one stage of SafeVLM's schedule, alone or within `run_schedule`.

    SafeVlmTrainer(model=model, args=SafeVlmTrainingArguments(stage="joint_finetuning", lora_r=8, output_dir="out"),
                   train_dataset=rows, eval_dataset=rows, processing_class=processor).train()

`__init__`     With a `train_dataset`: freezes everything the stage does not train, adds LoRA (`trainer.model` is then
               PEFT's wrapper) and converts trainable half-precision weights to float32. Without one the trainer only
               evaluates and changes no weights. Loss coefficients in `args` are written to the model's config.
`train`        Checks all rows first. At its end the best weights are restored (`load_best_model_at_end`), LoRA is
               merged and its adapter saved to `output_dir/adapter`, and dtypes and `requires_grad` are as before.
               `trainer.model` is the plain model again: the object that was passed, except under FSDP. Another call
               starts the stage anew from these weights.
`evaluate`, `predict`  May be called at any time. They take rows in the same forms as `train_dataset`. Predictions are
               the head's level and category logits, and whether it assessed the row at all (`False`: no picture).
`save_model`, `push_to_hub`  Write a folder or repository that `SafeVlmForConditionalGeneration.from_pretrained` loads.
               During training LoRA is merged into a copy.
checkpoints    `checkpoint-N/` is for resuming and for the best model: PEFT's adapter (LoRA and safety modules) with
               LoRA, otherwise the whole model. A resumed run ends with the same weights as an uninterrupted one, bit
               for bit, even if its newest checkpoint was only partly written.

TRL's trainers keep PEFT's wrapper after training and save the adapter. Here the plain model remains, because the next
stage, the policy and the Hub's Auto classes need it; the adapter is saved beside it.
"""

from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import Trainer

from safevlm.model_card import write_card
from safevlm.safety_modules import combine_losses
from safevlm.trainer.encoding.data_collator import SafeVlmDataCollator
from safevlm.trainer.encoding.encoded_datasets import EncodedDataset, EncodedStream, encode_rows
from safevlm.trainer.encoding.row_checks import check_sets
from safevlm.trainer.encoding.row_encoder import RowEncoder

from .card_callback import CardCallback, read_measured
from .checkpoints import is_complete, last_complete_checkpoint, load_weights
from .label_conditioning import draw_rows, label_conditioning_share
from .lora import merged_copy
from .mean_losses import LOSS_NAMES, LossCounts, MeanLosses
from .precision import quantized_base_allowed
from .sharding import check_sharding, without_weights
from .stage_model import StageModel
from .trainer_checks import check_parts, check_trainer_options
from .training_args import SafeVlmTrainingArguments
from .zero_gradients import zero_gradients

ROW_IDS = "row_ids"
NEVER_COMPLETE = " (checkpoints of `save_only_model` are never complete: they lack the optimizer)"


class NonFiniteError(ValueError):
    """A loss, a gradient or a verdict is not finite."""


class SafeVlmTrainer(Trainer):
    """
    Trains a [`SafeVlmForConditionalGeneration`] for one stage.

    Args:
        model (`SafeVlmForConditionalGeneration`): The plain model; the trainer adds LoRA itself.
        args (`SafeVlmTrainingArguments`)
        data_collator (callable, *optional*): Collates encoded rows (see `encode_row`). Defaults to
            [`SafeVlmDataCollator`].
        train_dataset, eval_dataset: Lists, `datasets` or torch data sets, iterable ones included, of [`SafetyRow`]s
            or of dicts as `row_from_record` reads them: `{"messages": [...], "images": [...], "category": ...,
            "level": ...}`. `eval_dataset` can also be a dict of such sets.
        processing_class (`SafeVlmProcessor`): The model's.
        kwargs: As in `Trainer`. Unsupported ones are refused by name.
    """

    def __init__(
        self,
        model=None,
        args: SafeVlmTrainingArguments | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        callbacks=None,
        **kwargs,
    ):
        check_parts(model, args, processing_class, train_dataset)
        check_trainer_options(args, kwargs)
        config = model.config
        for name in ("safety_level_loss_coef", "safety_category_loss_coef"):
            if getattr(args, name) is not None:
                setattr(config, name, getattr(args, name))
        self._config = config
        self._losses = MeanLosses()  # of training, since the last log
        self._eval_losses = MeanLosses()
        self._loss_counts = LossCounts(model.backbone.image_token_id)
        self._step_counts = dict.fromkeys(LOSS_NAMES, 0)
        self._row_ids: list[list[str]] = []  # of this step's micro-batches
        self._num_labels = 0  # that the head has learned from, in this training
        self._encoder = RowEncoder(processing_class, config, max_length=args.max_length, seed=args.seed)
        train_encoder = RowEncoder(processing_class, config, args.hint_probability, args.max_length, args.seed)
        collator = data_collator or SafeVlmDataCollator(processing_class.tokenizer.pad_token_id)
        options = dict(
            args=args,
            data_collator=_CollatorWithRowIds(collator),
            train_dataset=encode_rows(train_dataset, train_encoder, args.cache_encoded),
            eval_dataset=encode_rows(eval_dataset, self._encoder, args.cache_encoded),
            processing_class=processing_class,
            callbacks=[*([] if train_dataset is None else [CardCallback()]), *(callbacks or [])],
            **kwargs,
        )
        self._stage = None if train_dataset is None else StageModel(model, args)
        try:
            with quantized_base_allowed(model):
                super().__init__(model=model if self._stage is None else self._stage.model, **options)
            self.loss_is_scaled_for_ga = True  # see `compute_loss`
            check_sharding(self)
        except Exception:
            if self._stage is not None:
                self._stage.undo()
            raise

    # -- the stage ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As in `Trainer`; the top of this file says what it leaves behind."""
        if self.train_dataset is None:
            raise ValueError("`train_dataset` is missing: this trainer can only evaluate.")
        check_sets(self.train_dataset, self.eval_dataset, self.args)
        if self._stage is None:
            self._start_stage()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"No complete checkpoint to resume from in {self.args.output_dir!r}{NEVER_COMPLETE}.")
        elif resume_from_checkpoint and not is_complete(resume_from_checkpoint):
            raise ValueError(
                f"{str(resume_from_checkpoint)!r} is not a complete checkpoint to resume from{NEVER_COMPLETE}."
            )
        empty = without_weights(self.model) if self.is_fsdp_enabled else None
        self._num_labels = 0
        self._losses = MeanLosses()
        with zero_gradients(self.model.get_base_model() if self.args.uses_lora else self.model):
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        is_fresh_stream = isinstance(self.train_dataset, EncodedStream) and not resume_from_checkpoint
        if is_fresh_stream and self.args.trains_head and not self._num_labels:
            raise ValueError("No training row had a safety label and a picture: the safety head is untrained.")
        self._set_model(self._stage.end(self._unwrapped(), empty))
        self._stage = None
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.accelerator.free_memory()  # so that the next evaluation prepares the plain model
        return result

    def _start_stage(self):
        self._stage = StageModel(self.model, self.args)
        self._set_model(self._stage.model)
        if self.args.uses_lora:
            self.optimizer = self.lr_scheduler = None  # LoRA's weights are new

    def _set_model(self, model):
        self.model = self.model_wrapped = self.callback_handler.model = model

    def _unwrapped(self):
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Saves the plain model, with LoRA merged, and its processor, so that `from_pretrained` loads it."""
        if _internal_call and output_dir is not None:  # a checkpoint
            return super().save_model(output_dir, _internal_call=True)
        model = self._unwrapped()
        if self._stage is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("Under FSDP and DeepSpeed the model can be saved after `train()` only.")
            if self.args.uses_lora:
                model = merged_copy(model) if self.args.should_save else None
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            model.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _push_from_checkpoint(self, checkpoint_folder: str):
        # Loading the merged model would apply an adapter in the repository a second time.
        if not self.args.uses_lora:
            super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, model_name: str | None = None, **kwargs):
        """Writes SafeVLM's model card, with the facts this trainer knows, into `output_dir`."""
        if not self.is_world_process_zero():
            return
        names = "trainable lora_r learning_rate max_steps num_train_epochs per_device_train_batch_size".split()
        arguments = {name: getattr(self.args, name) for name in names}
        measured = read_measured(self.args.output_dir)
        training = {"stages": [{"stage": self.args.stage, "arguments": arguments, "measured": measured}]}
        if isinstance(self.train_dataset, EncodedDataset):
            training["rows"] = len(self.train_dataset)
        write_card(self.args.output_dir, {"model_name": model_name or "SafeVLM", "training": training})

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        model = self.model if model is None else model
        if self.args.uses_lora or self.is_fsdp_enabled:  # PEFT's and FSDP's checkpoints use `state_dict`'s names
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_weights(model, resume_from_checkpoint)

    def _load_best_model(self):
        if self.args.uses_lora or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        load_weights(self.model, self.state.best_model_checkpoint)

    # -- data --------------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset=None):
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = encode_rows(eval_dataset, self._encoder)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        return super().get_test_dataloader(encode_rows(test_dataset, self._encoder))

    def _get_train_sampler(self, train_dataset=None):
        with self._length_in_tokens():
            return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset):
        with self._length_in_tokens():
            return super()._get_eval_sampler(eval_dataset)

    @contextmanager
    def _length_in_tokens(self):
        """`Trainer` measures rows by the processing class's first input: of a processor pixels, of a tokenizer ids."""
        processor, self.processing_class = self.processing_class, self.processing_class.tokenizer
        try:
            yield
        finally:
            self.processing_class = processor

    def _prepare_inputs(self, inputs):
        if not self.model.training:
            self._row_ids.clear()
        self._row_ids.append(inputs.pop(ROW_IDS, []))
        return super()._prepare_inputs(inputs)

    # -- losses ------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_counts = self._loss_counts.of_step(batches, self.accelerator)
        self._num_labels += sum(self._step_counts[name] for name in LOSS_NAMES[1:])
        return batches, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            share = label_conditioning_share(self.args, self.state.global_step, self.state.max_steps)
            inputs = {**inputs, "condition_on_labels": draw_rows(inputs, share)}
        _, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        losses = {name: outputs.get(name) for name in LOSS_NAMES}
        counts = self._loss_counts.of_batch(inputs)
        # Gradients are averaged over processes. The LM loss is this micro-batch's sum divided by the tokens of the
        # whole step (all its micro-batches on all processes). The safety losses are means over this micro-batch and
        # become the same: sums divided by the rows of the whole step.
        over_step = num_items_in_batch is not None and self.args.average_tokens_across_devices
        if over_step and losses["lm_loss"] is not None:
            losses["lm_loss"] = losses["lm_loss"] * self.accelerator.num_processes
        if model.training:
            for name in LOSS_NAMES[1:]:
                if losses[name] is not None:
                    share = counts[name] / max(self._step_counts[name], 1)
                    losses[name] = losses[name] * share * self.accelerator.num_processes
        loss = combine_losses(*losses.values(), *self._coefs())
        self._check_finite(loss, losses)
        if not model.training:
            self._add_missing_verdicts(outputs, len(inputs["input_ids"]))
        (self._losses if model.training else self._eval_losses).add(outputs, counts, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _coefs(self) -> tuple[float, float]:
        return self._config.safety_level_loss_coef, self._config.safety_category_loss_coef

    def _check_finite(self, loss, losses):
        if not torch.isfinite(loss).all():
            parts = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items() if value is not None)
            raise NonFiniteError(
                f"The loss is {loss.item()} ({parts}) at step {self.state.global_step}, rows {self._named_rows(-1)}. "
                f"Lower `learning_rate`, set `max_grad_norm`, train in bf16 instead of fp16, or look at these rows."
            )

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None and not torch.isfinite(torch.as_tensor(norm)).all():
            raise NonFiniteError(  # with a scaler (fp16) such steps are expected and skipped
                f"The gradient's norm is {float(norm)} at step {self.state.global_step}, rows {self._named_rows()}. "
                f"Lower `learning_rate`, train in bf16 instead of fp16, or look at these rows."
            )
        self._row_ids.clear()
        return norm

    def _named_rows(self, start: int = 0) -> str:
        return ", ".join(repr(row) for rows in self._row_ids[start:] for row in rows) or "unknown"

    def _add_missing_verdicts(self, outputs, batch_size: int):
        """
        Adds zero logits and an all-false mask to the outputs of a batch without images, so that all batches have the
        same outputs. A verdict that is not finite raises `NonFiniteError`, since it would pass for a missing one.
        """
        if outputs.get("safety_assessed") is None:
            labels, device = self._config.labels, self.args.device
            outputs["safety_level_logits"] = torch.zeros(batch_size, len(labels.level_names), device=device)
            outputs["safety_category_logits"] = torch.zeros(batch_size, len(labels.category_names), device=device)
            outputs["safety_assessed"] = torch.zeros(batch_size, dtype=torch.bool, device=device)
        for name in ("safety_level_logits", "safety_category_logits"):
            bad = ~torch.isfinite(outputs[name]).all(dim=1) & outputs["safety_assessed"]
            if bad.any():
                ids = self._row_ids[-1] or [str(i) for i in range(batch_size)]
                rows = ", ".join(repr(row) for row, is_bad in zip(ids, bad.tolist(), strict=True) if is_bad)
                raise NonFiniteError(f"The head's `{name}` are not finite for rows {rows}: the weights are broken.")

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if ignore_keys is None:  # keep the mask, which tells "no picture" from a verdict
            ignore_keys = [name for name in self._config.keys_to_ignore_at_inference if name != "safety_assessed"]
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        if self._stage is None and (self.is_fsdp_enabled or self.is_deepspeed_enabled) and self.state.global_step:
            raise ValueError("After `train()` under FSDP or DeepSpeed, evaluate with a new trainer.")
        self._eval_losses = MeanLosses()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._row_ids.clear()
        means = self._eval_losses.means(self.accelerator)
        # `Trainer`'s own `loss` is a mean over batches: it depends on their composition, and is 0 without labels.
        output.metrics.pop(f"{metric_key_prefix}_loss", None)
        if means:
            parts = (torch.tensor(means[name]) if name in means else None for name in LOSS_NAMES)
            means["loss"] = combine_losses(*parts, *self._coefs()).item()
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        return output

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs = {**logs, **self._losses.means(self.accelerator)}  # since the last log
            self._losses = MeanLosses()
        super().log(logs, start_time)


class _CollatorWithRowIds:
    """Adds the ids of its rows to each batch of another collator."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, rows):
        return {**self.collator(rows), ROW_IDS: [getattr(row, "row_id", "?") for row in rows]}
