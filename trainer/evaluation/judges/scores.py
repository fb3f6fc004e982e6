"""Mean scores over judgements.

Means come with sample counts and bootstrap 95 % intervals; rows of one cluster (such as those about one image) are
resampled together. Answers that no judge could score are counted, never scored.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from safevlm.trainer.evaluation.bootstrap import check_clusters, percentile_interval, resampled_means

from .judgements import Judgement, add_usage


def judge_scores(
    judgements: Sequence[Judgement], clusters: Sequence[Hashable] | None = None, num_resamples: int = 1000
) -> dict:
    """
    The mean score of one sub-task.

    Returns:
        `mean` (0 to 10; `None` if nothing was scored), `interval`, `num_samples`, `num_scored`, `num_unparseable`,
        `num_rejected`, `num_reminders`, and under `usage` the sums of what the endpoint reported.
    """
    judgements = list(judgements)
    if not judgements:
        raise ValueError("`judgements` is empty: there is nothing to average.")
    scores, scored_clusters = _scored(judgements, clusters)
    return {
        "mean": float(np.mean(scores)) if scores else None,
        "interval": percentile_interval(resampled_means(scores, scored_clusters, num_resamples)) if scores else None,
        "num_samples": len(judgements),
        "num_scored": len(scores),
        "num_unparseable": sum(judgement.status == "unparseable" for judgement in judgements),
        "num_rejected": sum(judgement.status == "rejected" for judgement in judgements),
        "num_reminders": sum(judgement.num_reminders for judgement in judgements),
        "usage": add_usage(judgement.usage for judgement in judgements),
    }


def rtvlm_scores(
    judgements: dict[str, Sequence[Judgement]],
    clusters: dict[str, Sequence[Hashable]] | None = None,
    num_resamples: int = 1000,
) -> dict:
    """
    RTVLM's table: each sub-task's mean score, and the average over sub-tasks whatever their sizes (as in the paper).

    Args:
        judgements (`dict[str, list[Judgement]]`): By sub-task.
        clusters (`dict[str, list]`, *optional*): Also by sub-task. Clusters of different sub-tasks are never the same.

    Returns:
        `average` (`None` unless every sub-task has a score), its `interval`, and `subtasks` with each one's
        [`judge_scores`].
    """
    if not judgements:
        raise ValueError("`judgements` has no sub-task.")
    clusters = clusters or {}
    subtasks = {name: judge_scores(rows, clusters.get(name), num_resamples) for name, rows in judgements.items()}
    means = [result["mean"] for result in subtasks.values()]
    if None in means:
        return {"average": None, "interval": None, "subtasks": subtasks}
    resampled = [
        resampled_means(*_scored(rows, clusters.get(name)), num_resamples, seed)
        for seed, (name, rows) in enumerate(judgements.items())
    ]
    return {
        "average": float(np.mean(means)),
        "interval": percentile_interval(np.mean(resampled, axis=0)),
        "subtasks": subtasks,
    }


def _scored(
    judgements: Sequence[Judgement], clusters: Sequence[Hashable] | None
) -> tuple[list[int], list[Hashable] | None]:
    """The scores, and the clusters of the rows that have one."""
    indices = [index for index, judgement in enumerate(judgements) if judgement.status == "scored"]
    if clusters is not None:
        clusters = check_clusters(clusters, len(judgements))
        clusters = [clusters[index] for index in indices]
    return [judgements[index].score for index in indices], clusters
