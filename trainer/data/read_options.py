"""How data is read: the options of `read_rows`, most of which are also flags of the commands that read rows.

Imports nothing heavy: the commands take the text of their `--help` from here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from safevlm.safety_labels import PAPER_LABELS, SafetyLabels
from safevlm.trainer.options import option


def images_option():
    """The field `images` of a command's options: the `image_folder` of `read_rows`."""
    return option("folder or zip of the images (default: each data file's own folder)", None)


@dataclass(frozen=True)
class ReadOptions:
    """
    How the rows of a data set are read.

    Fields with a help text are also flags of the commands. The others are:

    Args:
        labels (`SafetyLabels`, *optional*): Names of the categories and levels. Integer labels in the data are
            indices into them. Defaults to the paper's.
        require_answer (`bool`, *optional*, defaults to `True`): Whether each row must have something to train on: an
            answer, or a label for the safety head. Pass `False` for evaluation data, which may be questions alone.
        check_images (`"full"`, `"header"` or `"none"`, *optional*, defaults to `"full"`): `"full"` decodes every
            image once (a few milliseconds each), so that training cannot fail on a broken one hours later; `"header"`
            finds missing files, refused formats and oversized images; `"none"` does not open any image.
        max_pixels (`int`, *optional*): Largest allowed image, width x height. Defaults to `MAX_PIXELS`, 50 million.
        source (`str`, *optional*): The rows' `source`. Defaults to the name of the data set if it is a known one,
            otherwise to the file name without extension, or the Hub id.

    Raises:
        `ValueError`: `check_images` or `on_error` is not one of its choices.
    """

    format: str | None = option("format of the data (default: recognised from the content)", None)
    taxonomy: str | os.PathLike | None = option(
        "how the data's own labels map to risk categories and levels: a YAML file, or the name of a shipped taxonomy "
        "(default: the format's)",
        None,
    )
    split: str | None = option("split to read, of data that has several; data without splits is given this one", None)
    subset: str | None = option("configuration of a data set on the Hub", None)
    revision: str | None = option("branch, tag or commit of a data set on the Hub", None)
    labels: SafetyLabels = PAPER_LABELS
    assume_safe: bool = option(
        "treat rows of a chat-like format without labels as safe, level 0; by default their labels are unknown", False
    )
    require_answer: bool = True
    check_images: Literal["full", "header", "none"] = "full"
    max_pixels: int | None = None
    on_error: Literal["raise", "skip"] = option(
        "skip and count rows with problems", "raise", flag="--skip-bad-rows", action="store_const", const="skip"
    )
    source: str | None = None

    def __post_init__(self) -> None:
        check_choice("on_error", self.on_error, ("raise", "skip"))
        check_choice("check_images", self.check_images, ("full", "header", "none"))


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises `ValueError` if the argument `name` has a value that is not allowed."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")
