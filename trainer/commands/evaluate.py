"""`safevlm evaluate`: safety, over-refusal and general ability of a model, alone or beside others."""

import shlex
import sys
from dataclasses import replace

from safevlm.trainer.evaluation.benchmarks.options import EvaluateOptions
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
    add_options(command, EvaluateOptions)


def run(args):
    options = replace(options_from(args, EvaluateOptions), command=shlex.join(["safevlm", *sys.argv[1:]]))
    check_policy(options.policy)
    model_config(args.model, "MODEL")
    for name, argument in _other_models(options):
        model_config(name, argument)
    check_device(options.device)
    from safevlm.trainer.evaluation.benchmarks.task_names import check_tasks

    check_tasks(options.tasks, options.data)
    require("lmms_eval", "`safevlm evaluate` needs")
    hide_loading_bars()
    from safevlm.trainer.evaluation.benchmarks.run import evaluate
    from safevlm.trainer.evaluation.benchmarks.systems import make_systems

    evaluate(make_systems(args.model, options.policy, options.compare or ()), options)
    sys.stdout.write((options.output / "comparison.md").read_text(encoding="utf-8"))
    sys.stdout.write(f"\nResults: {options.output / 'results.json'}\n")


def _other_models(options: EvaluateOptions):
    """The other arguments that name a model, each as the model's name and the argument's."""
    for item in options.compare or ():
        if name := item.partition("=")[2] or item.partition("guard:")[2]:
            yield name, "--compare"
    if options.judge.startswith("hf:"):
        yield options.judge.removeprefix("hf:"), "--judge"
