"""Runs a schedule of one step on four rows; started by test_distributed.py, alone or on two processes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tiny import chat, picture, safe_model, tiny_llava, tiny_processor

from safevlm import SafeVlmProcessor
from safevlm.trainer import Recipe, run_schedule
from safevlm.trainer.data import SafetyExample


def main(output_dir: str, batch_size: int):
    torch.set_num_threads(1)
    answers = ["no", "The answer is yes. " * 3, "yes", "What is in the picture?"]
    rows = [
        SafetyExample(
            f"row-{i}",
            [picture(i)],
            [*chat("Is it yes?"), {"role": "assistant", "content": [{"type": "text", "text": answer}]}],
            category=i,
            level=i,
        )
        for i, answer in enumerate(answers)
    ]
    processor = SafeVlmProcessor.from_base(tiny_processor())
    stage = dict(
        stage="safety_alignment",
        max_steps=1,
        optim="sgd",
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        hint_probability=0,
        per_device_train_batch_size=batch_size,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    run_schedule(safe_model(tiny_llava(), processor), processor, rows, output_dir, Recipe([stage]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
