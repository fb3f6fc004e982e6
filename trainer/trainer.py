"""SafeVlmTrainer: the transformers `Trainer` with the combined LM plus safety-classification loss.

Its overrides: `compute_loss` (label conditioning; safety losses right under gradient accumulation) and `log` (each loss
by name).
"""

from collections import defaultdict

import torch
from transformers import Trainer

from safevlm.losses import combine_losses

from .data_collator import SafeVlmDataCollator
from .encoding import EncodedDataset
from .training_args import SafeVlmTrainingArguments

LOSS_NAMES = ("lm_loss", "safety_level_loss", "safety_category_loss")


class SafeVlmTrainer(Trainer):
    """
    Trains a [`SafeVlmForConditionalGeneration`] (or its PEFT wrapper) for one stage.

    Args:
        model, args, callbacks, compute_metrics, ...: As in `Trainer`; `args` is a [`SafeVlmTrainingArguments`].
        train_dataset, eval_dataset (sequence of `SafetyExample`): Rows; encoded on access.
        processing_class (`SafeVlmProcessor`)
    """

    def __init__(
        self, model, args: SafeVlmTrainingArguments, train_dataset=None, eval_dataset=None, processing_class=None, **kwargs
    ):
        config = model.config
        for name in ("safety_level_loss_coef", "safety_category_loss_coef"):
            if getattr(args, name) is not None:
                setattr(config, name, getattr(args, name))
        if processing_class is None or processing_class.tokens_per_image != config.tokens_per_image:
            raise ValueError(
                f"`processing_class` must be the model's SafeVlmProcessor with `tokens_per_image={config.tokens_per_image}`, "
                f"got {getattr(processing_class, 'tokens_per_image', processing_class)!r}."
            )

        def encoded(rows, hint_probability):
            if rows is None or isinstance(rows, EncodedDataset):
                return rows
            return EncodedDataset(
                rows,
                processing_class,
                config,
                hint_probability=hint_probability,
                max_length=args.max_length,
                seed=args.seed,
                cache=args.cache_encoded,
            )

        super().__init__(
            model=model,
            args=args,
            train_dataset=encoded(train_dataset, args.hint_probability),
            eval_dataset=encoded(eval_dataset, 0.0),
            processing_class=processing_class,
            data_collator=SafeVlmDataCollator(processing_class.tokenizer.pad_token_id),
            **kwargs,
        )
        self._config = config
        self._losses = {"train": defaultdict(list), "eval": defaultdict(list)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            inputs = {**inputs, "label_conditioning": self._label_conditioning()}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        for name in LOSS_NAMES:
            if outputs.get(name) is not None:
                self._losses["train" if model.training else "eval"][name].append(outputs[name].detach())
        if model.training and num_items_in_batch is not None:
            # The LM loss is a sum over this micro-batch divided by the tokens of the whole accumulated batch, and was
            # scaled by the number of processes for that. The safety losses are means over the micro-batch: they need
            # the mean over accumulation steps, and no such factor.
            coefs = self._config.safety_level_loss_coef, self._config.safety_category_loss_coef
            parts = [outputs.get(name) for name in LOSS_NAMES]
            safety_loss = combine_losses(None, *parts[1:], *coefs)
            if safety_loss is not None:
                factor = loss.detach() / combine_losses(*parts, *coefs).detach()
                loss = loss - (factor - 1 / self.current_gradient_accumulation_steps) * safety_loss
        return (loss, outputs) if return_outputs else loss

    def _label_conditioning(self) -> float:
        """Share of label-conditioned rows at this point of the training, in [0, 1]."""
        start, end = self.args.label_conditioning_start, self.args.label_conditioning_end
        return start + (end - start) * min(self.state.global_step / max(self.state.max_steps, 1), 1.0)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs = {**logs, **self._mean_losses("train")}
        elif "eval_loss" in logs:
            logs = {**logs, **self._mean_losses("eval", prefix="eval_")}
        super().log(logs, start_time)

    def _mean_losses(self, which: str, prefix: str = "") -> dict[str, float]:
        """Means over the micro-batches since the last call, of this process."""
        accumulation = self.args.gradient_accumulation_steps if which == "train" else 1
        means = {}
        for name, values in self._losses[which].items():
            mean = torch.stack(values).float().mean().item()
            means[prefix + name] = mean * (accumulation if name == "lm_loss" else 1)
        self._losses[which].clear()
        return means
