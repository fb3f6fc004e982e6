"""Bootstrap intervals for data in clusters: rows about one image are not independent, so whole images are resampled.

A resample is one weight per row (how often its image was drawn), so a measure can be computed for many resamples at
once, from arrays of shape `(num_resamples, n)`.
"""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np

CONFIDENCE = 0.95
MIN_DEFINED = 0.95
"""An interval needs the measure to be defined in this share of the resamples (with a single class, AUROC is not)."""


def image_groups(images: Sequence[Sequence[str]]) -> np.ndarray:
    """
    Numbers the sets of rows that share an image, directly or through other rows.

    Args:
        images: Each row's image hashes; a row without images is a group of its own.

    Returns:
        `np.ndarray` of shape `(n,)`: Group ids, from 0.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    numbers: dict[str, int] = {}
    edges = [(row, numbers.setdefault(image, len(numbers))) for row, names in enumerate(images) for image in names]
    rows, columns = np.array(edges, dtype=int).reshape(-1, 2).T
    size = len(images) + len(numbers)
    graph = coo_matrix((np.ones(len(edges)), (rows, len(images) + columns)), shape=(size, size))
    _, groups = connected_components(graph, directed=False)
    return np.unique(groups[: len(images)], return_inverse=True)[1]


def resample_weights(
    groups: np.ndarray, num_resamples: int, seed: int = 0, elements: int = 2_000_000
) -> Iterator[np.ndarray]:
    """
    Yields the resamples in chunks of shape `(chunk, n)`, with at most about `elements` numbers each.

    Args:
        groups (`np.ndarray` of shape `(n,)`): Cluster ids, from 0. Each resample draws as many clusters as there are,
            with replacement.
    """
    rng = np.random.default_rng(seed)
    num_groups = int(groups.max()) + 1
    chunk = max(1, elements // len(groups))
    for start in range(0, num_resamples, chunk):
        draws = [
            np.bincount(rng.integers(num_groups, size=num_groups), minlength=num_groups)
            for _ in range(min(chunk, num_resamples - start))
        ]
        yield np.stack(draws)[:, groups].astype(float)


def resampled_means(
    values: Sequence[float], clusters: Sequence[Hashable] | None, num_resamples: int, seed: int = 0
) -> np.ndarray:
    """
    Means of shape `(num_resamples,)`.

    Args:
        clusters (*optional*): Each value's cluster; by default each value is its own cluster.
    """
    values = np.asarray(values, dtype=float)
    numbers: dict[Hashable, int] = {}
    names = range(len(values)) if clusters is None else check_clusters(clusters, len(values))
    groups = np.array([numbers.setdefault(name, len(numbers)) for name in names])
    chunks = [weights @ values / weights.sum(axis=1) for weights in resample_weights(groups, num_resamples, seed)]
    return np.concatenate(chunks)


def check_clusters(clusters: Sequence[Hashable], num_rows: int) -> list[Hashable]:
    """`clusters` as a list. Raises `ValueError` if there are not `num_rows` of them."""
    clusters = list(clusters)
    if len(clusters) != num_rows:
        raise ValueError(f"`clusters` has {len(clusters)} entries for {num_rows} rows; give one per row.")
    return clusters


def percentile_interval(values: np.ndarray) -> tuple[float, float] | None:
    """The central 95 % of a measure's resampled values; `None` if it is defined (not NaN) in too few resamples."""
    defined = values[~np.isnan(values)]
    if not len(values) or len(defined) < MIN_DEFINED * len(values):
        return None
    low, high = np.quantile(defined, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
