"""Data in: the row schema, hostile-proof image loading, readers, and sampling. Imports neither torch nor datasets."""

from .archives import ArchivedImage
from .errors import DataError, ImageError
from .formats import RowFormat
from .images import ALLOWED_FORMATS, MAX_PIXELS, ImageSource, load_image, probe_image
from .readers import (
    Rows,
    detect_format,
    iter_rows,
    read_llava_json,
    read_rows,
    read_safevlm_jsonl,
    register_format,
)
from .sampling import balance, split_holdout
from .schema import CATEGORY_NAMES, LEVEL_NAMES, SafetyExample, label_ids, safe_category_id
from .taxonomy import Taxonomy, shipped_taxonomies
from .writers import write_safevlm_jsonl

__all__ = [
    "ALLOWED_FORMATS",
    "CATEGORY_NAMES",
    "LEVEL_NAMES",
    "MAX_PIXELS",
    "ArchivedImage",
    "DataError",
    "ImageError",
    "ImageSource",
    "RowFormat",
    "Rows",
    "SafetyExample",
    "Taxonomy",
    "balance",
    "detect_format",
    "iter_rows",
    "label_ids",
    "load_image",
    "probe_image",
    "read_llava_json",
    "read_rows",
    "read_safevlm_jsonl",
    "register_format",
    "safe_category_id",
    "shipped_taxonomies",
    "split_holdout",
    "write_safevlm_jsonl",
]
