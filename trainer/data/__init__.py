"""Data in: the row schema, safe image loading, readers of many formats, sampling. Imports neither torch nor datasets.

The names below are imported from their modules when first used, so `import safevlm.trainer.data` stays cheap.
"""

from importlib import import_module

_EXPORTS = {
    "safevlm.safety_labels": ("PAPER_LABELS", "SafetyLabels"),
    ".archives": ("ArchivedImage",),
    ".errors": ("DataError", "ImageError"),
    ".formats": ("RowFormat", "register_format"),
    ".images": ("ALLOWED_FORMATS", "MAX_PIXELS", "ImageSource", "load_image", "probe_image"),
    ".labels_file": ("load_labels",),
    ".read_options": ("ReadOptions",),
    ".readers": (
        *("Rows", "detect_format", "iter_rows", "read_llava_json", "read_rows", "read_safevlm_jsonl"),
        "row_from_record",
    ),
    ".safety_row": ("SafetyRow", "label_ids"),
    ".sampling": ("balance", "split_holdout"),
    ".taxonomy": ("Taxonomy", "shipped_taxonomies"),
    ".writers": ("write_safevlm_jsonl",),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name], __name__), name)


def __dir__():
    return __all__
