"""What `safevlm code` prints about the code of a model."""

import re
from collections.abc import Iterator
from hashlib import sha256

from safevlm import __version__

from .code_review import Review, printable, read_code

WIDTH = 119


def review_lines(review: Review, with_diffs: bool) -> Iterator[str]:
    """
    A line for each file, the differences if asked for, and a summary.

    Args:
        with_diffs (`bool`): Whether to show how files differ from safevlm's.
    """
    yield from _listing(review)
    if with_diffs:
        yield from _diffs(review)
    yield from _summary(review)


def _listing(review: Review):
    width = max((len(printable(file.name)) for file in review.files), default=0)
    for file in review.files:
        docstring, imports, calls = read_code(file.content)
        digest = sha256(file.content).hexdigest()[:12]
        line = f"{file.status:<10} {len(file.content.splitlines()):>5}  {digest}  {printable(file.name):<{width}}"
        room = WIDTH - len(line) - 2
        purpose = printable(docstring)
        purpose = purpose if len(purpose) <= room else purpose[: max(room - 1, 0)] + "…"
        yield f"{line}  {purpose}".rstrip()
        if file.status != "same":
            yield f"    imports: {printable(', '.join(imports)) or '-'}"
            yield f"    calls: {printable(', '.join(calls)) or '-'}"
    yield from (f"elsewhere  {printable(name)}" for name in review.elsewhere)
    yield from (f"not loaded {printable(name)}" for name in review.not_loaded)


def _diffs(review: Review):
    for file in review.others:
        if file.status == "differs":
            yield from ("", *file.diff())
    if review.others:
        yield ""


def _summary(review: Review):
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
    # Only for a plain version number: people paste this line, and the model's file says what is in it.
    if version != __version__ and re.fullmatch(r"\d+(\.\w+){1,4}", version, re.ASCII):
        yield f"The model was saved by safevlm {version}: to compare with that, pip install safevlm=={version}"
