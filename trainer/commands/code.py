"""`safevlm code`: what `trust_remote_code=True` would run of a model, compared with the installed safevlm."""

import re
import sys

from .common import add_command


def add(commands):
    command = add_command(
        commands,
        "code",
        run,
        "List the Python files that a model would run, and whether they are safevlm's. Nothing is run.",
        example="safevlm code out/model --diff",
    )
    command.add_argument("model", help="folder or Hub id of a saved model; no weights are downloaded")
    command.add_argument("--revision", help="branch, tag or commit of a model on the Hub (default: main)")
    command.add_argument("--diff", action="store_true", help="show how files differ from safevlm's")


def run(args) -> int:
    from safevlm.model_card.code_report import review_lines
    from safevlm.model_card.code_review import code_folder, review_code

    folder = code_folder(args.model, args.revision)
    review = review_code(folder)
    sys.stdout.writelines(f"{line}\n" for line in review_lines(review, args.diff))
    if re.fullmatch("[0-9a-f]{40}", folder.name):  # the commit of a download: what was read, whatever comes later
        sys.stdout.write(f'Load what you read: revision="{folder.name}"\n')
    return 0 if review.all_same else 1
