"""The effect of precision on the safety head: its measures in float32, bfloat16, 8 bit and 4 bit, on new demo scenes.

    safevlm demo --output demo && python tests/benchmarks/quantization.py demo/model
    python tests/benchmarks/quantization.py demo/model --noise 60  # harder: otherwise the head is always right

Only the base is quantised; the safety modules keep their dtype. The demo neither trained nor tested on these scenes.
Only verdicts are computed (`assess`); no text is generated.
"""

import argparse
import sys
import time
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig

from safevlm import SafeVlmForConditionalGeneration, SafeVlmProcessor
from safevlm.trainer.asking import encode_chats, question_chat
from safevlm.trainer.demo.picture_world.examples import make_examples
from safevlm.trainer.evaluation import head_metrics

PRECISIONS = {
    "float32": lambda: {"dtype": torch.float32},
    "bfloat16": lambda: {"dtype": torch.bfloat16},
    "float16": lambda: {"dtype": torch.float16},
    "8 bit": lambda: {"dtype": torch.bfloat16, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
    "4 bit (nf4)": lambda: {
        "dtype": torch.bfloat16,
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
    },
}
REFERENCE = "bfloat16"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a demo's trained model")
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--seed", type=int, default=90_001)
    parser.add_argument("--noise", type=float, default=0, help="standard deviation of noise on pixels of 0 to 255")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    examples = make_examples("test", args.pictures, args.seed)
    generator = np.random.default_rng(args.seed)
    examples = [replace(example, image=noisy(example.image, args.noise, generator)) for example in examples]
    processor = SafeVlmProcessor.from_pretrained(args.model)
    verdicts, rows = {}, []
    for name, load in PRECISIONS.items():
        model = SafeVlmForConditionalGeneration.from_pretrained(args.model, device_map=args.device, **load())
        started = time.perf_counter()
        verdicts[name] = assess_all(model, processor, examples, args.batch_size, name)
        seconds = time.perf_counter() - started
        rows.append((name, model.get_memory_footprint() / 2**20, seconds))

    lines = [
        f"| precision | MiB | level accuracy | category macro-F1 | AUROC | same verdict as {REFERENCE} | largest risk "
        f"difference | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, size, seconds in rows:
        verdict, reference = verdicts[name], verdicts[REFERENCE]
        measures = head_metrics(
            [e.level for e in examples],
            verdict["level"].numpy(),
            [e.category for e in examples],
            verdict["category"].numpy(),
            verdict["score"].numpy(),
        )
        same = (verdict["level"] == reference["level"]) & (verdict["category"] == reference["category"])
        lines.append(
            f"| {name} | {size:.1f} | {measures['level_accuracy']:.4f} | {measures['category_macro_f1']:.4f} | "
            f"{measures['auroc']:.4f} | {same.float().mean().item():.4f} | "
            f"{(verdict['score'] - reference['score']).abs().max().item():.3f} | {seconds:.1f} |"
        )
    title = f"{len(examples)} questions about {args.pictures} pictures, seed {args.seed}, noise {args.noise:g}"
    sys.stdout.write(title + "\n\n")
    sys.stdout.write("\n".join(lines) + "\n")


def noisy(image: Image.Image, std: float, generator) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float32) + generator.normal(0, std, np.asarray(image).shape)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def assess_all(model, processor, examples, batch_size: int, name: str) -> dict[str, torch.Tensor]:
    """Level, category and score of each example, in order."""
    parts = []
    for start in tqdm(range(0, len(examples), batch_size), desc=name, unit="batch"):
        batch = examples[start : start + batch_size]
        chats = [question_chat(example.question) for example in batch]
        parts.append(model.assess(**encode_chats(processor, chats, [[example.image] for example in batch], model)))
    return {what: torch.cat([getattr(part, what).cpu() for part in parts]) for what in ("level", "category", "score")}


if __name__ == "__main__":
    main()
