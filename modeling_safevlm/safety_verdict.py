"""From the head's logits to a verdict: calibrated probabilities, category, level, score, and the policy's action.

This is the only place that turns logits into a verdict. If any of the head's numbers is not finite (overflowing
weights or pixels, say), there is no verdict, and the action is the strictest one whatever the policy says.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from .safety_labels import SafetyLabels
from .safety_policy import ACTIONS, SafetyPolicy

OFF = -1  # the action id under a policy that is off
NOT_FINITE = "The safety head's numbers are not finite, so the request is refused."


@dataclass
class HeadReading:
    """
    What the safety head says about a batch in one reading of its prompts, image by image.

    Args:
        level_logits (`torch.FloatTensor` of shape `(num_images, num_levels)`)
        category_logits (`torch.FloatTensor` of shape `(num_images, num_categories)`)
        rows (`torch.LongTensor` of shape `(num_images,)`): The row of the batch each image belongs to.
        batch_size (`int`)
    """

    level_logits: torch.Tensor
    category_logits: torch.Tensor
    rows: torch.Tensor
    batch_size: int

    def per_row(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Level and category logits of each row's worst image, 0 where there is none, and a `torch.BoolTensor` of shape
        `(batch_size,)` that says where there is one.
        """
        worst = worst_images(self.level_logits, self.rows, self.batch_size)
        level_logits, category_logits = (
            F.pad(logits, (0, 0, 0, 1))[worst] for logits in (self.level_logits, self.category_logits)
        )
        return level_logits, category_logits, worst >= 0


@dataclass(repr=False)
class SafetyVerdict:
    """
    The verdict on each row of a batch.

    Args:
        level_probabilities (`torch.FloatTensor` of shape `(batch_size, num_levels)`)
        category_probabilities (`torch.FloatTensor` of shape `(batch_size, num_categories)`)
        score (`torch.FloatTensor` of shape `(batch_size,)`): Calibrated probability of any risk, in [0, 1]. NaN where
            the head failed; then only `action`, which is `"refuse"`, means something.
        level, category (`torch.LongTensor` of shape `(batch_size,)`): Ids. They agree: a risky level has a risky
            category.
        action (`torch.LongTensor` of shape `(batch_size,)`): Ids into `ACTIONS`; -1, `"off"`, in what `generate`
            returns under a policy that is off (`assess` still reads the request, and allows it).
        assessed (`torch.BoolTensor` of shape `(batch_size,)`): `False` for a row without an image. Its probabilities
            are 0 and its action is `"allow"`.
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

    def __getitem__(self, rows) -> "SafetyVerdict":
        """The verdict on some rows (a slice or an index tensor)."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return SafetyVerdict(**{k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in values.items()})

    @classmethod
    def unassessed(cls, batch_size: int, labels: SafetyLabels, action: int = 0, device=None) -> "SafetyVerdict":
        """The verdict on rows that the head did not read."""
        ids = torch.zeros(batch_size, dtype=torch.long, device=device)
        return cls(
            level_probabilities=torch.zeros(batch_size, len(labels.level_names), device=device),
            category_probabilities=torch.zeros(batch_size, len(labels.category_names), device=device),
            score=torch.zeros(batch_size, device=device),
            level=ids,
            category=ids + labels.safe_category_id,
            action=ids + action,
            assessed=ids.bool(),
            category_names=list(labels.category_names),
            level_names=list(labels.level_names),
        )

    @property
    def actions(self) -> list[str]:
        return ["off" if action == OFF else ACTIONS[action] for action in self.action.tolist()]

    @property
    def failed(self) -> torch.Tensor:
        """`torch.BoolTensor` of shape `(batch_size,)`: Where the head's numbers were not finite."""
        return self.assessed & ~self.score.isfinite()

    def __repr__(self) -> str:
        """One line per row, for people; `to_list` has all the numbers."""
        lines = []
        for i, row in enumerate(self.to_list()):
            summary = row.get("error", "not assessed")
            if row["level"] is not None:
                summary = f"{row['category']}, {row['level']}, risk {row['score']:.3f}"
            lines.append(f"  row {i}: {row['action']} ({summary})")
        return "\n".join(["SafetyVerdict:", *lines])

    def to_list(self) -> list[dict]:
        """
        One JSON-ready dict per row. If there is no verdict, because the row was not assessed or because the head
        failed (`"error"` then says so), every value but `"action"` is `None`.
        """
        rows = []
        for i, (action, assessed, failed) in enumerate(zip(self.actions, self.assessed, self.failed, strict=True)):
            verdict = {
                "category": self.category_names[self.category[i]],
                "level": self.level_names[self.level[i]],
                "score": self.score[i].item(),
                "level_probabilities": dict(zip(self.level_names, self.level_probabilities[i].tolist(), strict=True)),
                "category_probabilities": dict(
                    zip(self.category_names, self.category_probabilities[i].tolist(), strict=True)
                ),
            }
            if failed or not assessed:
                verdict = dict.fromkeys(verdict)
            error = {"error": NOT_FINITE} if failed else {}
            rows.append({"assessed": bool(assessed), "action": action, **verdict, **error})
        return rows


def assess_logits(
    level_logits: torch.Tensor, category_logits: torch.Tensor, policy: SafetyPolicy, labels: SafetyLabels
) -> SafetyVerdict:
    """
    One verdict for each of the head's readings: calibration, then thresholds, then actions.

    Args:
        level_logits (`torch.FloatTensor` of shape `(num_readings, num_levels)`)
        category_logits (`torch.FloatTensor` of shape `(num_readings, num_categories)`)
        labels (`SafetyLabels`): The names behind the ids.
    """
    safe = labels.safe_category_id
    level_log_probs = level_log_probabilities(level_logits.float(), policy.level_temperature)
    category_probabilities = (category_logits.float() / policy.category_temperature).softmax(dim=-1)
    # 1 - P(level 0), computed so that small scores are not rounded to 0.
    score = (risk_logits(level_logits.float()) / policy.level_temperature).sigmoid()

    # The levels decide whether there is a risk, the categories which one, so a verdict never says "high" and "safe".
    # Logits, not probabilities: when the head is sure of "safe", all other probabilities round to 0.
    risky_category = category_logits.index_fill(
        1, torch.tensor([safe], device=category_logits.device), float("-inf")
    ).argmax(dim=-1)
    thresholds = policy.thresholds(labels).to(score.device)
    risky = ~(score < thresholds[risky_category])  # NaN counts as risky
    level = torch.where(risky, level_log_probs[:, 1:].argmax(dim=-1) + 1, 0)
    category = torch.where(risky, risky_category, safe)
    action = policy.action_table(labels).to(level.device)[category, level]

    # The logits count, too: a temperature or a softmax can hide an infinite one.
    numbers = (level_logits, category_logits, level_log_probs.exp(), category_probabilities, score.unsqueeze(1))
    failed = ~torch.stack([values.isfinite().all(dim=-1) for values in numbers]).all(dim=0)
    category = torch.where(failed & (category == safe), int(safe == 0), category)  # a refusal is never "safe"
    action = action.masked_fill(failed, len(ACTIONS) - 1) if policy.enabled else torch.zeros_like(action)
    return SafetyVerdict(
        level_probabilities=level_log_probs.exp(),
        category_probabilities=category_probabilities,
        score=score.masked_fill(failed, float("nan")),
        level=level,
        category=category,
        action=action,
        assessed=torch.ones_like(failed),
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
    The verdict on each row: the strictest of its readings. `generate` enforces it, calibration measures it.

    Args:
        level_logits (`torch.FloatTensor` of shape `(num_readings, num_levels)`): Of one image in one reading each.
        category_logits (`torch.FloatTensor` of shape `(num_readings, num_categories)`)
        rows (`torch.LongTensor` of shape `(num_readings,)`): The row each reading belongs to.
        batch_size (`int`): Number of rows. Those without a reading are not assessed.
    """
    unassessed = SafetyVerdict.unassessed(batch_size, labels, device=level_logits.device)
    return strictest(assess_logits(level_logits, category_logits, policy, labels), rows, unassessed)


def strictest(readings: SafetyVerdict, rows: torch.Tensor, unassessed: SafetyVerdict) -> SafetyVerdict:
    """
    Each row's verdict: its reading with the strictest action, and among those the highest score.

    Args:
        readings (`SafetyVerdict`): One verdict per reading.
        rows (`torch.LongTensor` of shape `(num_readings,)`): The row each reading belongs to.
        unassessed (`SafetyVerdict`): What rows without a reading get.
    """
    if not len(rows):
        return unassessed
    belongs = rows.unsqueeze(0) == torch.arange(len(unassessed), device=rows.device).unsqueeze(1)  # (rows, readings)
    rank = 2 * readings.action + readings.score.nan_to_num(nan=1.5)  # a failed reading ranks above all others
    best, assessed = rank.where(belongs, -1.0).argmax(dim=1), belongs.any(dim=1)
    chosen = readings[best]
    for field in fields(SafetyVerdict):
        value = getattr(chosen, field.name)
        if isinstance(value, torch.Tensor):
            present = assessed.view(-1, *[1] * (value.ndim - 1))
            setattr(chosen, field.name, torch.where(present, value, getattr(unassessed, field.name)))
    return chosen


def worst_images(level_logits: torch.Tensor, rows: torch.Tensor, batch_size: int) -> torch.Tensor:
    """
    Index of the image with the highest expected level in each row; -1 for rows without an image.

    Args:
        level_logits (`torch.FloatTensor` of shape `(num_images, num_levels)`)
        rows (`torch.LongTensor` of shape `(num_images,)`): The row each image belongs to.
    """
    levels = torch.arange(level_logits.shape[1], device=level_logits.device, dtype=torch.float)
    severity = (level_logits.detach().float().softmax(dim=-1) @ levels).nan_to_num(nan=float("inf"))  # (num_images,)
    belongs = rows.unsqueeze(0) == torch.arange(batch_size, device=rows.device).unsqueeze(1)  # (rows, images)
    severity = severity.where(belongs, float("-inf"))
    return F.pad(severity, (1, 0), value=float("-inf")).argmax(dim=1) - 1


def risk_logits(level_logits: torch.Tensor) -> torch.Tensor:
    """Log odds of any risk, of shape `(batch_size,)`, from level logits of shape `(batch_size, num_levels)`."""
    return level_logits[:, 1:].logsumexp(dim=-1) - level_logits[:, 0]


def level_log_probabilities(level_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    Calibrated log probabilities of the levels, of the same shape; at temperature 1 the log softmax of the logits.

    The temperature (arXiv 1706.04599) divides the log odds of any risk, and separately the logits of the levels given
    a risk. So it never reorders two scores, and a high temperature moves them towards 1/2. Dividing all logits at once
    could reorder scores, and would move them towards `1 - 1 / num_levels`.
    """
    risk = risk_logits(level_logits).unsqueeze(1) / temperature
    given_risk = (level_logits[:, 1:] / temperature).log_softmax(dim=-1)
    return torch.cat([F.logsigmoid(-risk), F.logsigmoid(risk) + given_risk], dim=-1)
