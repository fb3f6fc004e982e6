"""Progress bars for logs: if stderr is a file or a pipe, they write a line for every 10 %."""

import sys


def plain_progress():
    """
    Makes all progress bars of this process plain, unless stderr is a terminal. Ours, the Trainer's and those of
    transformers, datasets and the Hub are all tqdm's or inherit from it.
    """
    if sys.stderr.isatty():
        return
    from tqdm import std

    std.tqdm.display = _display
    std.tqdm.clear = _clear


def _display(bar, msg=None, pos=None) -> bool:
    """Replaces `tqdm.display`, which draws over its last line."""
    bar.leave = False  # otherwise closing it writes an empty line
    last = min(getattr(bar, "_last_shown", 0), bar.n)
    closing = bar.disable
    if bar.n > last and (closing or (bar.total and bar.n * 10 // bar.total > last * 10 // bar.total)):
        bar._last_shown = bar.n
        bar.fp.write(f"{str(bar).strip()}\n")
        bar.fp.flush()
    return False


def _clear(bar, nolock: bool = False):
    """Replaces `tqdm.clear`: written lines stay."""
