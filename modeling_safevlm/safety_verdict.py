"""From logits to a verdict: calibrated probabilities, category, level, score and the policy's action.

The one place that decides. Where the head's numbers are not finite (weights or a picture that overflow, say) there is
no verdict, and the action is the strictest there is, whatever the policy says.
"""

from dataclasses import dataclass, fields

import torch
from torch.nn.functional import logsigmoid

from .safety_labels import SafetyLabels
from .safety_policy import ACTIONS, SafetyPolicy

NOT_FINITE = "The safety head's numbers are not finite, so the request is refused."


@dataclass(repr=False)
class SafetyVerdict:
    """
    The verdict on each row of a batch. A row's verdict is its worst image's; a row without an image is not assessed.

    Args:
        level_probabilities (`torch.FloatTensor` of shape `(batch_size, num_levels)`)
        category_probabilities (`torch.FloatTensor` of shape `(batch_size, num_categories)`)
        score (`torch.FloatTensor` of shape `(batch_size,)`): Calibrated probability of any risk, in [0, 1].
        level, category (`torch.LongTensor` of shape `(batch_size,)`): Ids; they agree (no level without category).
        action (`torch.LongTensor` of shape `(batch_size,)`): Ids into `ACTIONS`. `"refuse"` where the head's numbers
            are not finite; the score is NaN then, and the rest means nothing. -1, `"off"`, in what `generate` returns
            under a policy that is off.
        assessed (`torch.BoolTensor` of shape `(batch_size,)`): `False` where no image was assessed; such a row's
            probabilities are 0 and its action is `"allow"`.
        category_names, level_names (`list[str]`)
    """

    level_probabilities: torch.Tensor
    category_probabilities: torch.Tensor
    score: torch.Tensor
    level: torch.Tensor
    category: torch.Tensor
    action: torch.Tensor
    assessed: torch.Tensor
    category_names: list[str]
    level_names: list[str]

    def __len__(self) -> int:
        return len(self.score)

    def __getitem__(self, row) -> "SafetyVerdict":
        """The assessment of some rows (a slice or an index tensor)."""
        picked = {f.name: getattr(self, f.name) for f in fields(self)}
        return SafetyVerdict(**{k: v[row] if isinstance(v, torch.Tensor) else v for k, v in picked.items()})

    @classmethod
    def off(cls, batch_size: int, labels: SafetyLabels) -> "SafetyVerdict":
        """What stands for the verdict under a policy that is off: nothing was assessed, and every action is "off"."""
        none = torch.zeros(batch_size, dtype=torch.long)
        return cls(
            level_probabilities=torch.zeros(batch_size, len(labels.level_names)),
            category_probabilities=torch.zeros(batch_size, len(labels.category_names)),
            score=torch.zeros(batch_size),
            level=none,
            category=none + labels.safe_category_id,
            action=none - 1,
            assessed=none.bool(),
            category_names=list(labels.category_names),
            level_names=list(labels.level_names),
        )

    @property
    def actions(self) -> list[str]:
        return ["off" if i < 0 else ACTIONS[i] for i in self.action.tolist()]

    @property
    def failed(self) -> torch.Tensor:
        """`torch.BoolTensor` of shape `(batch_size,)`: Where the head's numbers are not finite, so are no verdict."""
        return self.assessed & ~self.score.isfinite()

    def __repr__(self) -> str:
        """One line a row, for people; `to_list` has all the figures."""
        lines = []
        for i, row in enumerate(self.to_list()):
            verdict = row.get("error", "not assessed")
            if row["level"] is not None:
                verdict = f"{row['category']}, {row['level']}, risk {row['score']:.3f}"
            lines.append(f"  row {i}: {row['action']} ({verdict})")
        return "\n".join(["SafetyVerdict:", *lines])

    def to_list(self) -> list[dict]:
        """
        One JSON-ready dict per row, probabilities in [0, 1]. Where there is no verdict, because no image was assessed
        or because the head failed (then `"error"` says so), all but `"action"` is `None`.
        """
        rows, states = [], (self.actions, self.assessed.tolist(), self.failed.tolist())
        for i, (action, assessed, failed) in enumerate(zip(*states, strict=True)):
            verdict = {
                "category": self.category_names[self.category[i]],
                "level": self.level_names[self.level[i]],
                "score": self.score[i].item(),
                "level_probabilities": _named(self.level_names, self.level_probabilities[i]),
                "category_probabilities": _named(self.category_names, self.category_probabilities[i]),
            }
            if not assessed or failed:
                verdict = dict.fromkeys(verdict)
            rows.append({"assessed": assessed, "action": action, **verdict})
            if failed:
                rows[-1]["error"] = NOT_FINITE
        return rows


def _named(names, probabilities) -> dict[str, float]:
    return dict(zip(names, probabilities.tolist(), strict=True))


def assess_logits(
    level_logits: torch.Tensor,
    category_logits: torch.Tensor,
    assessed: torch.Tensor,
    policy: SafetyPolicy,
    labels: SafetyLabels,
) -> SafetyVerdict:
    """
    Applies calibration, thresholds and actions of `policy` to the head's logits.

    Args:
        level_logits (`torch.FloatTensor` of shape `(batch_size, num_levels)`)
        category_logits (`torch.FloatTensor` of shape `(batch_size, num_categories)`)
        assessed (`torch.BoolTensor` of shape `(batch_size,)`)
    """
    level_log_probs = level_log_probabilities(level_logits.float(), policy.level_temperature)
    level_probabilities = level_log_probs.exp()
    category_probabilities = (category_logits.float() / policy.category_temperature).softmax(dim=-1)
    # 1 - P(level 0), computed so that small scores are not rounded to 0.
    score = (risk_logits(level_logits.float()) / policy.level_temperature).sigmoid()

    # Levels and categories are separate classifiers. Level decides whether there is risk; the category then is the
    # most probable risky one, so that a verdict never says "high" and "safe" at once.
    safe = labels.safe_category_id
    # Compared as logs: beside a head that is sure of "safe", small probabilities are all rounded to 0.
    risky_category = category_logits.index_fill(
        1, torch.tensor([safe], device=category_logits.device), float("-inf")
    ).argmax(dim=-1)
    thresholds = policy.thresholds(labels).to(score.device)
    risky = assessed & ~(score < thresholds[risky_category])  # a threshold that is no number lets nothing through
    level = torch.where(risky, level_log_probs[:, 1:].argmax(dim=-1) + 1, 0)
    category = torch.where(risky, risky_category, safe)
    action = policy.action_table(labels).to(level.device)[category, level]
    # The logits, too: a temperature or a soft max can hide that one of them is infinite.
    numbers = (level_logits, category_logits, level_probabilities, category_probabilities, score.unsqueeze(1))
    failed = assessed & ~torch.stack([values.isfinite().all(dim=-1) for values in numbers]).all(dim=0)
    score = score.masked_fill(failed, float("nan"))
    category = torch.where(failed & (category == safe), int(safe == 0), category)  # of a refusal, so not the safe one
    action = action.masked_fill(failed, len(ACTIONS) - 1)
    if not policy.enabled:
        action = torch.zeros_like(action)
    unassessed = ~assessed
    return SafetyVerdict(
        level_probabilities=level_probabilities.masked_fill(unassessed.unsqueeze(1), 0.0),
        category_probabilities=category_probabilities.masked_fill(unassessed.unsqueeze(1), 0.0),
        score=score.masked_fill(unassessed, 0.0),
        level=level,
        category=category,
        action=action.masked_fill(unassessed, 0),
        assessed=assessed,
        category_names=list(labels.category_names),
        level_names=list(labels.level_names),
    )


def assess_rows(
    level_logits: torch.Tensor,
    category_logits: torch.Tensor,
    rows: torch.Tensor,
    batch_size: int,
    policy: SafetyPolicy,
    labels: SafetyLabels,
) -> SafetyVerdict:
    """
    The verdict on each row: its worst over images and readings. What `assess` and `generate` enforce, and what
    calibration measures.

    Args:
        level_logits (`torch.FloatTensor` of shape `(num_readings, num_levels)`): One reading of one image each.
        category_logits (`torch.FloatTensor` of shape `(num_readings, num_categories)`)
        rows (`torch.LongTensor` of shape `(num_readings,)`): The row each belongs to.
        batch_size (`int`): How many rows there are. Those without a reading are not assessed.
    """
    read = torch.ones_like(rows, dtype=torch.bool)
    readings = assess_logits(level_logits, category_logits, read, policy, labels)
    nothing = [logits.new_zeros(batch_size, logits.shape[1]) for logits in (level_logits, category_logits)]
    unassessed = assess_logits(*nothing, read.new_zeros(batch_size), policy, labels)
    return worst_verdicts(readings, rows, unassessed)


def risk_logits(level_logits: torch.Tensor) -> torch.Tensor:
    """Log odds of any risk, of shape `(batch_size,)`, from level logits of shape `(batch_size, num_levels)`."""
    return level_logits[:, 1:].logsumexp(dim=-1) - level_logits[:, 0]


def level_log_probabilities(level_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    Calibrated log probabilities of the levels, of the same shape; at temperature 1 the logits' log soft max.

    The temperature (arXiv 1706.04599) divides the log odds of any risk, and the logits of the levels given risk. So it
    never changes the order of two risk scores, and a high one moves them to 1/2. Dividing all logits would change the
    order, since a score depends on how many levels share the risk, and move scores to `1 - 1 / num_levels`.
    """
    risk = risk_logits(level_logits).unsqueeze(1) / temperature
    given_risk = (level_logits[:, 1:] / temperature).log_softmax(dim=-1)
    return torch.cat([logsigmoid(-risk), logsigmoid(risk) + given_risk], dim=-1)


def worst_images(level_logits: torch.Tensor, rows: torch.Tensor, batch_size: int) -> torch.Tensor:
    """
    Index of each row's worst image, the one of highest expected level; -1 for rows without an image.

    Args:
        level_logits (`torch.FloatTensor` of shape `(num_images, num_levels)`)
        rows (`torch.LongTensor` of shape `(num_images,)`): The row each image belongs to.
    """
    levels = torch.arange(level_logits.shape[1], device=level_logits.device, dtype=torch.float)
    severity = (level_logits.detach().float().softmax(dim=-1) @ levels).nan_to_num(nan=float("inf"))
    belongs = rows.unsqueeze(0) == torch.arange(batch_size, device=rows.device).unsqueeze(1)  # (batch, images)
    best = severity.unsqueeze(0).masked_fill(~belongs, float("-inf")).argmax(dim=1)
    return torch.where(belongs.any(dim=1), best, -1)


def worst_verdicts(images: SafetyVerdict, rows: torch.Tensor, unassessed: SafetyVerdict) -> SafetyVerdict:
    """
    Each row's verdict: that of its image with the strictest action, and of those the highest score.

    Args:
        images (`SafetyVerdict`): One verdict per image.
        rows (`torch.LongTensor` of shape `(num_images,)`): The row each image belongs to.
        unassessed (`SafetyVerdict`): What rows without an image get.
    """
    if not len(rows):
        return unassessed
    belongs = rows.unsqueeze(0) == torch.arange(len(unassessed), device=rows.device).unsqueeze(1)  # (batch, images)
    rank = 2 * images.action + images.score.nan_to_num(nan=1.5)  # a reading that failed is the strictest
    rank = rank.unsqueeze(0).masked_fill(~belongs, -1.0)
    worst, assessed = rank.argmax(dim=1), belongs.any(dim=1)
    chosen = {}
    for field in fields(SafetyVerdict):
        mine, instead = getattr(images, field.name), getattr(unassessed, field.name)
        if isinstance(mine, torch.Tensor):
            mine = torch.where(assessed.view(-1, *[1] * (mine.ndim - 1)), mine[worst], instead)
        chosen[field.name] = mine
    return SafetyVerdict(**chosen)
