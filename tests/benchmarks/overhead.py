"""What the safety path costs beside the base model: seconds and tokens, as ratios to the base in the same run.

    python tests/benchmarks/overhead.py                  # a LLaVA of 1.5-7B's widths, two layers deep, random weights
    python tests/benchmarks/overhead.py --layers 32 --device cuda --dtype bfloat16

Random pictures and questions; medians over repeats, base and safe runs interleaved.
"""

import argparse
import statistics
import sys
import time

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="decoder layers (7B: 32)")
    parser.add_argument("--vision-layers", type=int, default=4, help="vision tower layers (7B: 24)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--paper", action="store_true", help="the paper's sizes instead of the efficient default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=8)
    args = parser.parse_args()

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

    def timed(function) -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            function()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def generate(target, ids, new_tokens, **kwargs):
        return lambda: target.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            **kwargs,
        )

    runs = {
        "base, first token": generate(model.base, plain, 1),
        "safe, first token": generate(model, safe, 1, safety_policy=policy),
        "base, answer": generate(model.base, plain, args.new_tokens),
        "safe, answer": generate(model, safe, args.new_tokens, safety_policy=policy),
        "assess alone": lambda: model.assess(input_ids=safe, pixel_values=pixels),
        "vision tower alone": lambda: model.backbone.encode(model.base, pixel_values=pixels),
    }
    for run in runs.values():
        timed(run)  # warm up
    times = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            times[name].append(timed(run))
    median = {name: statistics.median(values) for name, values in times.items()}
    added = sum(p.numel() for p in model.safety.parameters())
    base = sum(p.numel() for p in model.base.parameters())
    per_token = {
        side: (median[f"{side}, answer"] - median[f"{side}, first token"]) / max(args.new_tokens - 1, 1)
        for side in ("base", "safe")
    }
    lines = [
        f"{args.layers} decoder and {args.vision_layers} vision layers of LLaVA-1.5-7B's widths, {args.device}, "
        f"{args.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        f"added parameters: {added / 1e6:.1f} M beside {base / 1e6:.1f} M; added prompt tokens per image: {tokens}",
    ]
    lines += [
        f"{name:<20} {median[name] * 1e3:9.1f} ms  ({min(v) * 1e3:.1f} .. {max(v) * 1e3:.1f})"
        for name, v in times.items()
    ]
    lines += [
        f"first token, safe / base:      {median['safe, first token'] / median['base, first token']:.3f}",
        f"each further token, safe/base: {per_token['safe'] / per_token['base']:.3f}",
        f"assess / base's first token:   {median['assess alone'] / median['base, first token']:.3f}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
