"""`safevlm card` and `safevlm push`: describe a saved model, and publish it."""

import sys
from pathlib import Path

from .common import add_command, check_model_type


def add(commands):
    card = add_command(
        commands,
        "card",
        run_card,
        "Rewrite a model's card, with the results of evaluate and calibrate. Your own words in it stay.",
        example="safevlm card out/model --evaluation results --calibration cal",
    )
    card.add_argument("model", type=Path, help="folder of a saved SafeVLM")
    card.add_argument("--evaluation", type=Path, help="folder that `safevlm evaluate` wrote")
    card.add_argument("--calibration", type=Path, help="folder that `safevlm calibrate` wrote")

    push = add_command(
        commands,
        "push",
        run_push,
        "Publish a saved model, or its safety modules, on the Hub; private unless you say otherwise.",
        example="safevlm push out/model --repo-id you/llava-1.5-7b-safe --dry-run",
    )
    push.add_argument("folder", type=Path, help="folder of a saved SafeVLM, or of a safety adapter")
    push.add_argument("--repo-id", required=True, help="NAMESPACE/NAME on the Hub")
    push.add_argument("--public", action="store_true", help="visible to everyone (default: private)")
    push.add_argument("--dry-run", action="store_true", help="check and list what would be sent, but send nothing")
    push.add_argument("--revision", help="branch to push to; created if missing (default: main)")
    push.add_argument("--create-pr", action="store_true", help="propose the files as a pull request")
    push.add_argument("--adapter-only", action="store_true", help="only safety modules and LoRA, without the base")
    push.add_argument("--max-shard-size", default="5GB", help="split larger weight files (default: 5GB)")
    push.add_argument("--message", help="message of the commit")


def run_card(args):
    if not args.model.is_dir():
        raise ValueError(f"MODEL {str(args.model)!r} is not a folder; a card is written beside a saved model.")
    check_model_type(str(args.model), "MODEL")
    from safevlm.model_card import refresh_card
    from safevlm.trainer.card_results import add_calibration, add_evaluation

    if args.evaluation is not None:
        add_evaluation(args.model, args.evaluation)
    if args.calibration is not None:
        add_calibration(args.model, args.calibration)
    sys.stdout.write(f"Card: {refresh_card(args.model)}\n")


def run_push(args):
    from safevlm.model_card import push_to_hub
    from safevlm.model_card.push import CommitOptions

    push = push_to_hub(
        args.folder,
        args.repo_id,
        public=args.public,
        dry_run=args.dry_run,
        adapter_only=args.adapter_only,
        max_shard_size=args.max_shard_size,
        commit=CommitOptions(args.revision, args.create_pr, args.message),
    )
    for name, size in push.files.items():
        sys.stdout.write(f"{_size(size):>9}  {name}\n")
    for name in push.left_out:
        sys.stdout.write(f" not sent  {name}\n")
    where = f"{push.repo_id} ({'public' if args.public else 'private'})"
    if args.create_pr:
        where = f"a pull request on {push.repo_id}"
    total = f"{len(push.files)} files, {_size(sum(push.files.values()))}"
    if push.url is None:
        sys.stdout.write(f"Dry run: {total} would go to {where}.\n")
    elif not push.changed:
        sys.stdout.write(f"Nothing to send: {push.repo_id} has all {total} already: {push.url}\n")
    else:
        sys.stdout.write(f"Sent {total} to {where}: {push.url}\n")


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
