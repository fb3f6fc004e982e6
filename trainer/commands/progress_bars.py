"""Progress bars where nobody watches them: a line for every 10 %, where stderr is a file or a pipe."""

import sys


def plain_progress():
    """
    Makes all bars of this process plain, unless stderr is a terminal: our own, the Trainer's, those of transformers,
    datasets and the Hub. All are tqdm's, or inherit from it.
    """
    if sys.stderr.isatty():
        return
    from tqdm import std

    std.tqdm.display = _display
    std.tqdm.clear = _clear


def _display(bar, msg=None, pos=None) -> bool:
    """In the place of `tqdm.display`, which would draw over the line it drew last."""
    bar.leave = False  # or closing it would write an empty line
    last = min(getattr(bar, "_last_shown", 0), bar.n)
    closing = bar.disable
    if bar.n > last and (closing or (bar.total and bar.n * 10 // bar.total > last * 10 // bar.total)):
        bar._last_shown = bar.n
        bar.fp.write(f"{str(bar).strip()}\n")
        bar.fp.flush()
    return False


def _clear(bar, nolock: bool = False):
    """In the place of `tqdm.clear`: what was written stays."""
