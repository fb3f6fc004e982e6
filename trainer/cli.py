"""The `safevlm` command: demo, train, assess, answer."""

import argparse
import json
import logging
import os
import sys
from pathlib import Path

import yaml

EXAMPLES = {
    "demo": "safevlm demo --output demo --seed 0",
    "train": "safevlm train --base llava-hf/llava-1.5-7b-hf --data rows.jsonl --images pictures --output out",
    "assess": 'safevlm assess picture.jpg --question "How do I use this?" --model out/model',
    "answer": 'safevlm answer picture.jpg "What is in the picture?" --model out/model --policy strict',
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code. Errors in what the user passed are one line, without a traceback."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        args.run(args)
    except (ValueError, OSError, ImportError, yaml.YAMLError) as error:
        if args.verbose:
            raise
        sys.stderr.write(f"safevlm {args.command}: {' '.join(str(error).split())}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="safevlm",
        description="Make a vision-language model safe: train, assess, answer.",
        epilog="Example: safevlm demo",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add(name, run, summary):
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"Example:\n  {EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--verbose", action="store_true", help="log progress, and show tracebacks of errors")
        command.set_defaults(run=run)
        return command

    demo = add("demo", _demo, "Build, train, evaluate and use a tiny SafeVLM from nothing, in minutes on two cores.")
    demo.add_argument("--output", type=Path, default=Path("demo"), help="folder to write (default: demo)")
    demo.add_argument("--seed", type=int, default=0, help="the run is reproducible in it (default: 0)")
    demo.add_argument("--fast", action="store_true", help="a rough run of about a minute")

    train = add(
        "train", _train, "Add safety modules to a base model and train both stages; repeat the command to resume."
    )
    train.add_argument("--base", required=True, help="Hub id or folder of a vision-language model, or of a SafeVLM")
    train.add_argument("--data", required=True, nargs="+", type=Path, help="rows: SafeVLM JSONL or LLaVA JSON")
    train.add_argument("--images", type=Path, help="folder that the rows' image paths are relative to")
    train.add_argument("--output", required=True, type=Path, help="folder to write; the model ends up in OUTPUT/model")
    train.add_argument("--recipe", default="paper", help="a shipped recipe or a YAML file (default: paper)")
    train.add_argument(
        "--holdout", type=float, default=0.1, help="share of rows to evaluate on (default: 0.1; 0: none)"
    )
    train.add_argument("--assume-safe", action="store_true", help="rows without labels count as safe")
    train.add_argument("--skip-bad-rows", action="store_true", help="skip and count rows with problems")
    train.add_argument("--dtype", default="auto", help="weights' dtype: auto, float32, bfloat16 (default: auto)")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="training arguments for all stages, e.g. max_steps=100",
    )

    assess = add(
        "assess", _assess, "The verdict on an image and a question, as JSON; the language model does not run."
    )
    assess.add_argument("image", type=Path)
    assess.add_argument("--question", default="Describe this image.", help="what is asked (default: a description)")

    answer = add("answer", _answer, "Ask a saved model a question about an image.")
    answer.add_argument("image", type=Path)
    answer.add_argument("question")
    answer.add_argument("--max-new-tokens", type=int, default=256)
    answer.add_argument("--json", action="store_true", help="print answer and verdict as JSON")
    for command in (assess, answer):
        command.add_argument("--model", required=True, help="folder or Hub id of a SafeVLM")
        command.add_argument(
            "--policy", help="default, paper, strict, off, or a policy file (default: the model's own)"
        )
        command.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    return parser


def _demo(args):
    import psutil

    from .demo.run import run_demo

    run_demo(args.output, seed=args.seed, fast=args.fast, started=psutil.Process().create_time())


def _train(args):
    from accelerate import PartialState

    from .run import train_from_files

    report = train_from_files(
        base=args.base,
        data=args.data,
        images=args.images,
        output_dir=args.output,
        recipe=args.recipe,
        holdout=args.holdout,
        assume_safe=args.assume_safe,
        on_error="skip" if args.skip_bad_rows else "raise",
        dtype=args.dtype,
        seed=args.seed,
        overrides=dict(_override(item) for item in args.set),
    )
    if PartialState().is_main_process:
        _print_json(report)


def _override(item: str) -> tuple[str, object]:
    name, equals, value = item.partition("=")
    if not equals:
        raise ValueError(f"--set {item!r} must be NAME=VALUE, such as max_steps=100.")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"--set {item!r}: the value is no valid YAML.") from None


def _assess(args):
    model, processor, inputs = _load(args, args.question)
    verdict = model.assess(**inputs, safety_policy=args.policy)
    _print_json(verdict.to_list()[0])


def _answer(args):
    model, processor, inputs = _load(args, args.question)
    output = model.generate(
        **inputs,
        safety_policy=args.policy,
        tokenizer=processor.tokenizer,
        max_new_tokens=args.max_new_tokens,
        return_dict_in_generate=True,
    )
    text = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    safety = None if output["safety"] is None else output["safety"].to_list()[0]
    if args.json:
        _print_json({"answer": text, "safety": safety})
    else:
        sys.stdout.write(text + "\n")
        if safety is not None:
            sys.stdout.write(
                f"[{safety['action']}; {safety['category']}, {safety['level']}; risk {safety['score']:.3f}]\n"
            )


def _load(args, question: str):
    """A saved model, its processor, and one question about one image as model inputs."""
    import torch
    from transformers import AutoConfig
    from transformers import logging as transformers_logging

    from safevlm import SafeVlmConfig, SafeVlmForConditionalGeneration, SafeVlmProcessor

    from .data import load_image

    transformers_logging.disable_progress_bar()
    image = load_image(args.image)
    model_type = AutoConfig.from_pretrained(args.model).model_type
    if model_type != SafeVlmConfig.model_type:
        raise ValueError(
            f"--model {args.model!r} is of type {model_type!r}, not a SafeVLM; "
            f"make one of it with: safevlm train --base {args.model} ..."
        )
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = SafeVlmForConditionalGeneration.from_pretrained(args.model, dtype="auto").to(device).eval()
    processor = SafeVlmProcessor.from_pretrained(args.model)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=[image], text=[prompt], return_tensors="pt").to(device, model.dtype)
    return model, processor, inputs


def _print_json(value):
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
