"""Data in: the row schema, hostile-proof image loading, readers, and sampling. Imports neither torch nor datasets."""

from safevlm.safety_labels import PAPER_LABELS, SafetyLabels

from .archives import ArchivedImage
from .errors import DataError, ImageError
from .formats import RowFormat, register_format
from .images import ALLOWED_FORMATS, MAX_PIXELS, ImageSource, load_image, probe_image
from .labels_file import load_labels
from .readers import (
    Rows,
    detect_format,
    iter_rows,
    read_llava_json,
    read_rows,
    read_safevlm_jsonl,
    row_from_record,
)
from .safety_row import SafetyRow, label_ids
from .sampling import balance, split_holdout
from .taxonomy import Taxonomy, shipped_taxonomies
from .writers import write_safevlm_jsonl

__all__ = [
    "ALLOWED_FORMATS",
    "MAX_PIXELS",
    "PAPER_LABELS",
    "ArchivedImage",
    "DataError",
    "ImageError",
    "ImageSource",
    "RowFormat",
    "Rows",
    "SafetyRow",
    "SafetyLabels",
    "Taxonomy",
    "balance",
    "detect_format",
    "row_from_record",
    "iter_rows",
    "label_ids",
    "load_image",
    "load_labels",
    "probe_image",
    "read_llava_json",
    "read_rows",
    "read_safevlm_jsonl",
    "register_format",
    "shipped_taxonomies",
    "split_holdout",
    "write_safevlm_jsonl",
]
