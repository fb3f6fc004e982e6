"""Data sets on the Hub, read with `datasets`: downloaded once, or streamed row by row.

`datasets` does not decode the images but hands over their bytes, which `images` then checks like all others. No code
of the repository runs: `datasets` 4.0 and later ignores loading scripts, and no loader that a repository can choose
unpickles anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from safevlm.trainer.data.errors import DataError
from safevlm.trainer.data.images import ImageSource

from .container import Container
from .data_files import Item


def open_hub(
    repository: str,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    find_image: Callable[[str], ImageSource] | None = None,
) -> Container:
    """One split of a data set on the Hub.

    Args:
        repository (`str`): `owner/name`.
        split (`str`, *optional*): Required if there are several.
        subset (`str`, *optional*): The configuration (`name` in `datasets`). Required if there are several.
        revision (`str`, *optional*): A branch, tag or commit. Pin a commit for reproducible rows.
        streaming (`bool`, *optional*, defaults to `False`): Whether to read row by row instead of downloading first.
        find_image (`Callable`, *optional*): Finds images that the rows name but do not contain.

    Raises:
        `DataError`: It cannot be loaded, or a choice is missing.
    """
    import datasets

    if int(datasets.__version__.split(".")[0]) < 4:  # older versions may run a script of the repository
        raise ImportError("Reading from the Hub needs datasets>=4; pip install 'datasets>=4'.")
    _reach(repository, revision)
    try:
        loaded = datasets.load_dataset(repository, name=subset, split=split, revision=revision, streaming=streaming)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(
            f"{repository!r} is not a file here and cannot be loaded from the Hub ({type(error).__name__}: {error}); "
            "check the name, `subset` and `split`, and for gated sets run `hf auth login`."
        ) from error
    if isinstance(loaded, dict):
        if len(loaded) != 1:
            raise DataError(f"{repository!r} has the splits {sorted(loaded)}; choose one with `split`.")
        ((split, loaded),) = loaded.items()
    loaded = _undecoded(loaded)
    split, subset = split or "", subset or ""

    def records() -> tuple[str, Iterator[Item]]:
        return "row", _items(repository, loaded)

    return Container(
        name=repository,
        file_name=repository,
        stem=subset,
        open_records=records,
        find_image=find_image or _no_image(repository),
        folder=repository,
        split=split,
        subset=subset,
        remote=streaming,
    )


def _reach(repository: str, revision: str | None) -> None:
    """Fails at once if there is no network; `datasets` alone would retry for half a minute."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().dataset_info(repository, revision=revision, timeout=10)
    except (HfHubHTTPError, ValueError):  # the Hub answered: `datasets` will report what is wrong
        return
    except Exception as error:  # the errors of its HTTP client
        raise DataError(
            f"{repository!r} is not a file here and the Hub cannot be reached ({type(error).__name__}: {error}); "
            "check the name and the network, or set HF_HUB_OFFLINE=1 to read the copy in the cache."
        ) from error


def _items(repository: str, rows: Any) -> Iterator[Item]:
    rows, number = iter(rows), 0
    while True:
        try:
            record = next(rows)
        except StopIteration:
            return
        except Exception as error:  # network failures, damaged shards, unexpected types
            raise DataError(
                f"{repository!r}: row {number + 1} cannot be read ({type(error).__name__}: {error})."
            ) from error
        number += 1
        yield Item(number, record)


def _no_image(repository: str) -> Callable[[str], ImageSource]:
    def image(name: str) -> ImageSource:
        raise DataError(
            f"the row names the image {name!r} instead of holding it; download the repository "
            f"(hf download --repo-type dataset {repository} --local-dir FOLDER) and pass `image_folder`, or read "
            "`revision='refs/convert/parquet'`, where the Hub keeps a copy with the images in it"
        )

    return image


def _undecoded(rows: Any) -> Any:
    """The rows with images as `{"bytes", "path"}`."""
    import datasets

    if isinstance(rows, datasets.IterableDataset) and rows.features is None:
        rows = rows._resolve_features()  # reads the first row; the public API would lose nested image columns
    return rows.cast(_without_decoding(rows.features)) if rows.features else rows


def _without_decoding(feature: Any) -> Any:
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        converted = {name: _without_decoding(inner) for name, inner in feature.items()}
        return datasets.Features(converted) if isinstance(feature, datasets.Features) else converted
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return type(feature)(
            _without_decoding(feature.feature), **({"length": feature.length} if hasattr(feature, "length") else {})
        )
    if isinstance(feature, list):
        return [_without_decoding(inner) for inner in feature]
    return feature
