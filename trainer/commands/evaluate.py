"""`safevlm evaluate`: safety, over-refusal and general ability of a model, alone or beside others."""

import shlex
import sys
from dataclasses import replace

from safevlm.trainer.evaluation.benchmarks.settings import EvaluationSettings
from safevlm.trainer.evaluation.benchmarks.task_names import check_tasks
from safevlm.trainer.evaluation.eval_extra import require
from safevlm.trainer.options import add_options, options_from

from .common import add_command, check_device, check_policy, hide_loading_bars, model_config


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
    command.add_argument("--policy", help="default, paper, strict, off, or a policy file (default: the model's own)")
    command.add_argument(
        "--compare",
        default="",
        help="more rows for the table: base, guard-prompt, stage1, stage2, presets, guard:MODEL_ID, separated by "
        "commas; base=PATH and stage1=PATH if they are elsewhere",
    )
    add_options(command, EvaluationSettings)


def run(args):
    settings = options_from(args, EvaluationSettings)
    check_policy(args.policy)
    model_config(args.model, "MODEL")
    for name, argument in _other_models(args):
        model_config(name, argument)
    check_device(args.device)
    tasks = _list(args.tasks)
    check_tasks(tasks, settings.data)
    require("lmms_eval", "`safevlm evaluate` needs")
    hide_loading_bars()
    from safevlm.trainer.evaluation.benchmarks.run import evaluate
    from safevlm.trainer.evaluation.benchmarks.systems import make_systems

    settings = replace(settings, command=shlex.join(["safevlm", *sys.argv[1:]]))
    evaluate(make_systems(args.model, args.policy, _list(args.compare)), tasks, settings)
    sys.stdout.write((settings.output / "comparison.md").read_text(encoding="utf-8"))
    sys.stdout.write(f"\nResults: {settings.output / 'results.json'}\n")


def _other_models(args):
    """The names of further models, each with the argument that it was given in."""
    for item in _list(args.compare):
        if name := item.partition("=")[2] or item.partition("guard:")[2]:
            yield name, "--compare"
    if args.judge.startswith("hf:"):
        yield args.judge.removeprefix("hf:"), "--judge"


def _list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]
