"""What the safety path costs beside the base model: seconds and tokens, as ratios to the base in the same run.

    python tests/benchmarks/overhead.py                  # a LLaVA of 1.5-7B's widths, two layers deep, random weights
    python tests/benchmarks/overhead.py --layers 32 --device cuda --dtype bfloat16

Random pictures and questions. Base and safe runs alternate; ratios are medians over neighbouring runs, so that
a machine that slows down slows both. Single decoding steps are timed inside `generate`: the step that writes the n-th
token of an answer against the base's step that writes its n-th.
"""

import argparse
import statistics
import sys
import time

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from safevlm import SafeVlmConfig, SafeVlmForConditionalGeneration
from safevlm.from_base import wrap


def build(args) -> SafeVlmForConditionalGeneration:
    torch.manual_seed(0)
    base_config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=args.vision_layers,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=args.layers,
            num_attention_heads=32,
            vocab_size=32064,
            max_position_embeddings=4096,
        ),
        image_token_index=32000,
    )
    with torch.device(args.device):
        base = LlavaForConditionalGeneration(base_config).to(getattr(torch, args.dtype)).eval()
        config = SafeVlmConfig.paper(base_config) if args.paper else SafeVlmConfig(base_config)
        config.safety_token_id = 32010
        model = wrap(SafeVlmForConditionalGeneration, base, config).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


class Clock(BaseStreamer):
    """Notes when each token is written; the prompt comes first and is not one."""

    def __init__(self, synchronize):
        self.synchronize, self.times = synchronize, []

    def put(self, value):
        self.synchronize()
        self.times.append(time.perf_counter())

    def end(self):
        pass

    def steps(self) -> list[float]:
        """Seconds for each token after the first."""
        written = self.times[1:]
        return [after - before for before, after in zip(written, written[1:], strict=False)]


def ratio(safe: list[float], base: list[float]) -> float:
    """Median over pairs of runs that followed each other."""
    return statistics.median(s / b for s, b in zip(safe, base, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="decoder layers (7B: 32)")
    parser.add_argument("--vision-layers", type=int, default=4, help="vision tower layers (7B: 24)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--paper", action="store_true", help="the paper's sizes instead of the efficient default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=9)
    args = parser.parse_args()
    if args.new_tokens < 2:
        parser.error(f"--new-tokens must be 2 or more, got {args.new_tokens}: the first is not a step of its own")

    model = build(args)
    tokens = model.config.tokens_per_image
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 336, 336, generator=generator).to(args.device, getattr(torch, args.dtype))
    question = torch.randint(100, 30000, (1, 40), generator=generator)
    image = torch.full((1, 576), 32000)
    plain = torch.cat([question[:, :5], image, question[:, 5:]], dim=1).to(args.device)
    safe = torch.cat([question[:, :5], image, torch.full((1, tokens), 32010), question[:, 5:]], dim=1).to(args.device)
    # The untrained head's verdicts are random: allow everything, so that both sides answer at the same length.
    policy = {"level_actions": {}, "risk_threshold": 1.0}

    def synchronize():
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()

    steps = {"base": [], "safe": []}

    def answer(side, target, ids, **kwargs) -> float:
        """Seconds to the first token; the steps after it are noted."""
        clock = Clock(synchronize)
        synchronize()
        start = time.perf_counter()
        target.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            max_new_tokens=args.new_tokens,
            min_new_tokens=args.new_tokens,
            do_sample=False,
            streamer=clock,
            **kwargs,
        )
        steps[side] += clock.steps()
        return clock.times[1] - start

    def timed(function) -> float:
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        return time.perf_counter() - start

    runs = {
        "base, first token": lambda: answer("base", model.base, plain),
        "safe, first token": lambda: answer("safe", model, safe, safety_policy=policy),
        "assess alone": lambda: timed(lambda: model.assess(input_ids=safe, pixel_values=pixels)),
        "vision tower alone": lambda: timed(lambda: model.backbone.encode(model.base, pixel_values=pixels)),
    }
    times = {name: [] for name in runs}
    with torch.no_grad():
        for run in runs.values():
            run()  # warm up
        for side in steps.values():
            side.clear()
        for _ in range(args.repeats):
            for name, run in runs.items():
                times[name].append(run())
    base = times["base, first token"]
    ratios = {
        "first token, safe / base:": ratio(times["safe, first token"], base),
        "each further token, safe / base:": ratio(steps["safe"], steps["base"]),
        "assess / base's first token:": ratio(times["assess alone"], base),
    }
    times |= {f"{side}, further token": seconds for side, seconds in steps.items()}
    added = sum(p.numel() for p in model.safety.parameters())
    own = sum(p.numel() for p in model.base.parameters())
    lines = [
        f"{args.layers} decoder and {args.vision_layers} vision layers of LLaVA-1.5-7B's widths, {args.device}, "
        f"{args.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        f"added parameters: {added / 1e6:.1f} M beside {own / 1e6:.1f} M; added prompt tokens per image: {tokens}",
    ]
    lines += [
        f"{name:<20} {statistics.median(v) * 1e3:9.1f} ms  ({min(v) * 1e3:.1f} .. {max(v) * 1e3:.1f}, {len(v)} times)"
        for name, v in times.items()
    ]
    lines += [f"{name:<33}{value:.3f}" for name, value in ratios.items()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
