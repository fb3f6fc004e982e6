"""`safevlm evaluate`: safety, over-refusal and general ability of a model, alone or beside others."""

import shlex
import sys
from pathlib import Path

from .common import add_command, check_device, check_policy, model_config


def add(commands):
    command = add_command(
        commands,
        "evaluate",
        run,
        "Evaluate a model on safety and general benchmarks, offline on local copies; repeat the command to resume.",
        example="safevlm evaluate out/model --tasks figstep,mossbench,mmbench --data data --output results "
        "--compare base,guard-prompt,stage1,stage2,presets",
    )
    command.add_argument("model", help="folder or Hub id of a SafeVLM or another vision-language model")
    command.add_argument("--tasks", required=True, help="our tasks and groups or lmms-eval's, separated by commas")
    command.add_argument("--data", required=True, type=Path, help="folder with local copies of the data sets")
    command.add_argument("--output", required=True, type=Path, help="folder to write results to")
    command.add_argument("--policy", help="default, paper, strict, off, or a policy file (default: the model's own)")
    command.add_argument(
        "--compare",
        default="",
        help="more rows for the table: base, guard-prompt, stage1, stage2, presets, guard:MODEL_ID, separated by "
        "commas; base=PATH and stage1=PATH where they are not found",
    )
    command.add_argument("--judge", default="rules", help="rules, openai:MODEL or hf:ID (default: rules)")
    command.add_argument("--limit", type=int, help="only the first so many items of each task")
    command.add_argument("--batch-size", type=int, default=8, help="items asked at once (default: 8)")
    command.add_argument("--max-new-tokens", type=int, help="cap on the tasks' own answer lengths")
    command.add_argument("--seed", type=int, default=0, help="of samples and intervals (default: 0)")
    command.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    command.add_argument("--dtype", default="auto", help="of the weights: auto, bfloat16, ... (default: auto)")


def run(args):
    from safevlm.trainer.evaluation.benchmarks.task_names import check_tasks

    check_policy(args.policy)
    model_config(args.model, "MODEL")
    for name, argument in _other_models(args):
        model_config(name, argument)
    check_device(args.device)
    check_tasks(_list(args.tasks), args.data)
    from safevlm.trainer.evaluation.eval_extra import require

    require("lmms_eval", "`safevlm evaluate` needs")
    from transformers import logging as transformers_logging

    from safevlm.trainer.evaluation.benchmarks.run import evaluate
    from safevlm.trainer.evaluation.benchmarks.settings import EvaluationSettings
    from safevlm.trainer.evaluation.benchmarks.systems import make_systems

    transformers_logging.disable_progress_bar()
    settings = EvaluationSettings(
        data=args.data,
        output=args.output,
        limit=args.limit,
        judge=args.judge,
        seed=args.seed,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        device=args.device,
        dtype=args.dtype,
        command=shlex.join(["safevlm", *sys.argv[1:]]),
    )
    evaluate(make_systems(args.model, args.policy, _list(args.compare)), _list(args.tasks), settings)
    sys.stdout.write((args.output / "comparison.md").read_text(encoding="utf-8"))
    sys.stdout.write(f"\nResults: {args.output / 'results.json'}\n")


def _other_models(args):
    """What beside MODEL names a model, and the argument that does."""
    for item in _list(args.compare):
        if name := item.partition("=")[2] or item.partition("guard:")[2]:
            yield name, "--compare"
    if args.judge.startswith("hf:"):
        yield args.judge.removeprefix("hf:"), "--judge"


def _list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]
