"""`safevlm code`: what `trust_remote_code=True` would run of a model, compared with the installed safevlm."""

import re
import sys
from hashlib import sha256

from .common import add_command

WIDTH = 119


def add(commands):
    command = add_command(
        commands,
        "code",
        run,
        "List the Python files that a model would run, and whether they are safevlm's; nothing of it is run.",
        example="safevlm code out/model --diff",
    )
    command.add_argument("model", help="folder or Hub id of a saved model; no weights are downloaded")
    command.add_argument("--revision", help="branch, tag or commit of a model on the Hub (default: main)")
    command.add_argument("--diff", action="store_true", help="show how files differ from safevlm's")


def run(args) -> int:
    from safevlm.model_card.code_review import code_folder, review_code

    folder = code_folder(args.model, args.revision)
    review = review_code(folder)
    for line in [*_listing(review), *_diffs(review, args.diff), *_summary(review)]:
        sys.stdout.write(f"{line}\n")
    if re.fullmatch("[0-9a-f]{40}", folder.name):  # a download: this is what was read, whatever comes later
        sys.stdout.write(f'Load what you read: revision="{folder.name}"\n')
    return 0 if review.all_same else 1


def _listing(review):
    from safevlm.model_card.code_review import printable, read_code

    width = max((len(printable(file.name)) for file in review.files), default=0)
    for file in review.files:
        docstring, imports, calls = read_code(file.content)
        digest = sha256(file.content).hexdigest()[:12]
        line = f"{file.status:<10} {len(file.content.splitlines()):>5}  {digest}  {printable(file.name):<{width}}"
        room = WIDTH - len(line) - 2
        docstring = printable(docstring)
        docstring = docstring if len(docstring) <= room else docstring[: max(room - 1, 0)] + "…"
        yield f"{line}  {docstring}".rstrip()
        if file.status != "same":
            yield f"    imports: {printable(', '.join(imports)) or '-'}"
            yield f"    calls: {printable(', '.join(calls)) or '-'}"
    yield from (f"elsewhere  {printable(name)}" for name in review.elsewhere)
    yield from (f"not loaded {printable(name)}" for name in review.not_loaded)


def _diffs(review, wanted: bool):
    for file in review.others if wanted else ():
        if file.status == "differs":
            yield from ("", *file.diff())
    if wanted and review.others:
        yield ""


def _summary(review):
    from safevlm import __version__
    from safevlm.model_card.code_review import printable

    yield from (f"The model's own policy is weak: {printable(weakness)}" for weakness in review.weaknesses)
    total, others = len(review.files), len(review.others)
    if not total and review.all_same:
        yield "The model brings no code: there is nothing to compare, and nothing of it would run"
        return
    if review.all_same:
        lines = sum(len(file.content.splitlines()) for file in review.files)
        yield f"{total} files, {lines} lines: all as in safevlm {__version__}"
        return
    if others:
        are, them = ("are", "them") if others > 1 else ("is", "it")
        advice = f"read {them} before you trust {them} (--diff shows how)"
        yield f"{others} of {total} files {are} not safevlm {__version__}'s: {advice}"
    if review.elsewhere:
        yield "What is named under elsewhere is not in this folder and was not compared: read it where it is"
    version = str(review.saved_by)
    # Of a plain version only: what a model's file says ends up in somebody's shell.
    if version != __version__ and re.fullmatch(r"\d+(\.\w+){1,4}", version, re.ASCII):
        yield f"The model was saved by safevlm {version}: to compare with that, pip install safevlm=={version}"
