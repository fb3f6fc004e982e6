"""Runs a schedule on four rows; started by test_distributed.py, alone or on two processes."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate.state import AcceleratorState, DistributedType
from tiny import chat, picture, safe_model, tiny_llava, tiny_processor

from safevlm import SafeVlmProcessor
from safevlm.trainer import Recipe, run_schedule
from safevlm.trainer.data import SafetyRow

DEFAULTS = dict(
    optim="sgd",
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    max_grad_norm=0,
    hint_probability=0,
    label_conditioning_end=1.0,  # no dice, which two processes would throw differently
    lora_dropout=0,
    save_strategy="no",
    logging_steps=1,
    disable_tqdm=True,
    report_to="none",
    use_cpu=True,
)


def allow_fsdp_on_cpu():
    """accelerate ignores FSDP without GPUs; this does for CPUs (gloo) what it does for GPUs."""
    init = AcceleratorState.__init__

    def init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init_with_fsdp


def main(output_dir: str, stages: str, without_picture: str = ""):
    """`stages` is a JSON list of training arguments; rows whose number is in `without_picture` have none."""
    torch.set_num_threads(1)
    answers = ["no", "The answer is yes. " * 3, "yes", "What is in the picture?"]
    rows = []
    for i, answer in enumerate(answers):
        pictures = [] if str(i) in without_picture else [picture(i)]
        turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        messages = [*chat("Is it yes?", len(pictures)), turn]
        rows.append(SafetyRow(f"row-{i}", pictures, messages, category=i, level=i))
    processor = SafeVlmProcessor.from_base(tiny_processor())
    recipe = Recipe([{**DEFAULTS, **stage} for stage in json.loads(stages)])
    run_schedule(safe_model(tiny_llava(), processor), processor, rows, output_dir, recipe)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    main(*sys.argv[1:])
