"""The cost of the safety path: seconds and tokens, relative to the base model in the same run.

    python tests/benchmarks/overhead.py                  # a LLaVA of 1.5-7B's widths, two layers deep, random weights
    python tests/benchmarks/overhead.py --layers 32 --device cuda --dtype bfloat16

Pictures and questions are random. Base and safe model take turns, one token at a time, and each ratio is the median
over such pairs of tokens: if the machine slows down for a while, both sides of a pair are slower.
"""

import argparse
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

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
        config = SafeVlmConfig.paper(base_config) if args.paper else SafeVlmConfig(base_config=base_config)
        config.safety_token_id = 32010
        model = wrap(SafeVlmForConditionalGeneration, base, config).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


class Clock(BaseStreamer):
    """
    Times the parts of a `generate` call that takes turns with another one: until the prompt is handed over (vision
    tower and head), from there to the first token, and each further token.

    Args:
        synchronize (`Callable[[], None]`): Waits for the device.
        my_turn, others_turn (`threading.Semaphore`)
    """

    def __init__(self, synchronize, my_turn: threading.Semaphore, others_turn: threading.Semaphore):
        self.synchronize, self.my_turn, self.others_turn = synchronize, my_turn, others_turn
        self.seconds: list[float] = []

    def time(self, generate):
        """Calls `generate(streamer=self)`."""
        try:
            self._begin()
            generate(streamer=self)
        finally:
            self.others_turn.release(1000)  # the other call never waits again

    def put(self, value):
        self.synchronize()
        self.seconds.append(time.perf_counter() - self.started)
        self.others_turn.release()
        self._begin()

    def end(self):
        pass

    def _begin(self):
        self.my_turn.acquire()
        self.synchronize()
        self.started = time.perf_counter()

    @property
    def first_token(self) -> float:
        return self.seconds[0] + self.seconds[1]

    @property
    def further_tokens(self) -> list[float]:
        return self.seconds[2:]


def in_turns(synchronize, *generates) -> list[Clock]:
    """Runs two `generate` calls at once that alternate part by part."""
    turns = [threading.Semaphore(1), threading.Semaphore(0)]
    clocks = [Clock(synchronize, turns[0], turns[1]), Clock(synchronize, turns[1], turns[0])]
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(clock.time, generate) for clock, generate in zip(clocks, generates, strict=True)]:
            done.result()
    return clocks


def ratio(safe: list[float], base: list[float]) -> float:
    """The median ratio of pairs; the two times of a pair were measured one directly after the other."""
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
        parser.error(f"--new-tokens must be 2 or more, got {args.new_tokens}: the first token is not a separate step")

    model = build(args)
    tokens = model.config.tokens_per_image
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 336, 336, generator=generator).to(args.device, getattr(torch, args.dtype))
    question = torch.randint(100, 30000, (1, 40), generator=generator)
    image = torch.full((1, 576), 32000)
    plain = torch.cat([question[:, :5], image, question[:, 5:]], dim=1).to(args.device)
    safe = torch.cat([question[:, :5], image, torch.full((1, tokens), 32010), question[:, 5:]], dim=1).to(args.device)
    # The untrained head's verdicts are random: allow everything, so that both models give answers of equal length.
    policy = {"level_actions": {"none": "allow"}, "risk_threshold": 1.0}

    def synchronize():
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()

    def answer(target, ids, **kwargs):
        return lambda **streamer: target.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            max_new_tokens=args.new_tokens,
            min_new_tokens=args.new_tokens,
            do_sample=False,
            **kwargs,
            **streamer,
        )

    def timed(function) -> float:
        synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            function()
        synchronize()
        return time.perf_counter() - start

    names = ("base, first token", "safe, first token", "base, further token", "safe, further token")
    times = {name: [] for name in (*names, "assess alone", "vision tower alone")}
    for repeat in range(args.repeats + 1):
        base, secured = in_turns(synchronize, answer(model.base, plain), answer(model, safe, safety_policy=policy))
        assess = timed(lambda: model.assess(input_ids=safe, pixel_values=pixels))
        vision = timed(lambda: model.backbone.encode(model.base, pixel_values=pixels))
        if repeat:  # the first run is a warm-up
            firsts, further = (
                ([base.first_token], [secured.first_token]),
                (base.further_tokens, secured.further_tokens),
            )
            for name, seconds in zip(times, (*firsts, *further, [assess], [vision]), strict=True):
                times[name] += seconds
    ratios = {
        "first token, safe / base:": ratio(times["safe, first token"], times["base, first token"]),
        "each further token, safe / base:": ratio(times["safe, further token"], times["base, further token"]),
        "assess / base's first token:": ratio(times["assess alone"], times["base, first token"]),
    }
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
