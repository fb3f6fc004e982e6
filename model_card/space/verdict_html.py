"""Verdicts as HTML: the card beside an answer, the badge of an action, the audit's table and a policy in one line.

Every text is escaped, and nothing is conveyed by colour alone. Where they stand on the page is in `layout.py`.
"""

from __future__ import annotations

from html import escape

THUMBNAIL_SIDE = 96  # longest side of a picture in the audit's table, in pixels

# Action -> mark, word, and what it means for the visitor.
ACTIONS = {
    "allow": ("✓", "Allowed", "The risk is below the policy's threshold; the model answers normally."),
    "caution": ("i", "Caution", "The risk is low; the model answers with care."),
    "warn": ("!", "Warning", "The risk is clear; the model warns or declines."),
    "refuse": ("✕", "Refused", "The risk is high; the policy refuses to answer."),
}


def verdict(safety: dict, policy: str) -> str:
    """
    The card that shows a verdict.

    Args:
        safety (`dict`): A row of `SafetyVerdict.to_list()`; its action is `"off"` if the policy assesses nothing.
        policy (`str`): The name of the policy in force.
    """
    if safety["action"] == "off":
        return _card('<p class="sv-empty">Safety is off: nothing was assessed.</p>', policy)
    if not safety["assessed"]:
        return _card(
            '<p class="sv-empty"><strong>Not assessed.</strong> The safety head assesses a question together with a '
            "picture, and this conversation has no picture yet.</p>",
            policy,
        )
    if "error" in safety:
        return _card(f'<div class="sv-top">{badge(safety["action"])}</div><p>{escape(safety["error"])}</p>', policy)
    _, _, meaning = ACTIONS[safety["action"]]
    return _card(
        f'<div class="sv-top">{badge(safety["action"])}<span class="sv-meaning">{meaning}</span></div>'
        f'<dl class="sv-facts"><div><dt>Risk score</dt><dd>{percent(safety["score"])}</dd></div>'
        f"<div><dt>Category</dt><dd>{escape(safety['category'].capitalize())}</dd></div>"
        f"<div><dt>Level</dt><dd>{escape(safety['level'].capitalize())}</dd></div></dl>"
        f"{_levels(safety)}{_bars('Category probabilities', safety['category_probabilities'], safety['category'])}",
        policy,
    )


def no_verdict_yet() -> str:
    """The verdict's card before the first question."""
    return _card(
        '<p class="sv-empty">Ask a question about a picture. The verdict on both appears here before the answer '
        "starts.</p>"
    )


def assessing(text: str = "Assessing the request …") -> str:
    """The verdict's card while the model is assessing."""
    return _card(f'<p class="sv-empty sv-busy">{escape(text)}</p>')


def badge(action: str) -> str:
    """The action in a mark and a word, such as "✕ Refused"."""
    mark, word, _ = ACTIONS[action]
    return f'<span class="sv-badge sv-{action}"><span aria-hidden="true">{mark}</span>{word}</span>'


def policy_line(policy, level_names: list[str]) -> str:
    """What a policy does, in one line of plain text."""
    if not policy.enabled:
        return "Safety is off: the base model answers unfiltered."
    actions = ", ".join(f"{level} → {policy.level_actions.get(level, 'allow')}" for level in level_names[1:])
    special = "; some categories differ" if policy.category_actions or policy.category_risk_thresholds else ""
    return f"Counts as risky from a score of {policy.risk_threshold:.0%}. By level: {actions}{special}."


def audit_table(rows: list[dict], total: int) -> str:
    """
    The verdicts of an audit so far.

    Args:
        rows (`list[dict]`): `file`, `thumbnail` (a data URI or `""`), and `safety` or `error`.
        total (`int`): Number of pictures in the whole audit.
    """
    counts = [(word, sum(_action(row) == action for row in rows)) for action, (_, word, _) in ACTIONS.items()]
    counts.append(("Unreadable", sum("error" in row for row in rows)))
    shown = " · ".join(f"{count} {word.lower()}" for word, count in counts if count)
    state = f"{len(rows)} of {total} pictures" + (f": {shown}" if shown else "")
    body = "".join(_audit_row(row) for row in rows)
    return (
        f'<div class="sv-card"><p class="sv-summary" role="status">{state}</p><div class="sv-scroll" tabindex="0" '
        f'role="region" aria-label="Audit results"><table class="sv-table"><thead><tr><th scope="col">Picture</th>'
        f'<th scope="col">Verdict</th><th scope="col">Category</th><th scope="col">Level</th>'
        f'<th scope="col" class="sv-number">Risk</th></tr></thead><tbody>{body}</tbody></table></div></div>'
    )


def _action(row: dict) -> str | None:
    return row["safety"]["action"] if "safety" in row else None


def _audit_row(row: dict) -> str:
    picture = (
        f'<img src="{escape(row["thumbnail"])}" alt="">' if row["thumbnail"] else '<span class="sv-noimg"></span>'
    )
    name = f'<th scope="row"><div class="sv-file">{picture}<span>{escape(row["file"])}</span></div></th>'
    if "error" in row:
        return f'<tr>{name}<td colspan="4">{escape(row["error"])}</td></tr>'
    safety = row["safety"]
    if "error" in safety:
        return f'<tr>{name}<td>{badge(safety["action"])}</td><td colspan="3">{escape(safety["error"])}</td></tr>'
    return (
        f"<tr>{name}<td>{badge(safety['action'])}</td><td>{escape(safety['category'])}</td>"
        f'<td>{escape(safety["level"])}</td><td class="sv-number">{percent(safety["score"])}</td></tr>'
    )


def _card(content: str, policy: str | None = None) -> str:
    note = "" if policy is None else f'<p class="sv-note">Under the policy “{escape(policy)}”</p>'
    heading = '<h2 class="sv-title">Verdict</h2>'
    return f'<section class="sv-card" aria-live="polite" aria-label="Verdict">{heading}{content}{note}</section>'


def _levels(safety: dict) -> str:
    names = list(safety["level_probabilities"])
    reached = names.index(safety["level"])
    steps = "".join(
        f'<li class="{"sv-on" if i <= reached else ""} sv-step{i * 3 // max(1, len(names) - 1)}"'
        f"{' aria-current=true' if i == reached else ''}>"
        f"<span>{escape(name)}</span><small>{percent(safety['level_probabilities'][name])}</small></li>"
        for i, name in enumerate(names)
    )
    return f'<h3 class="sv-sub">Level probabilities</h3><ol class="sv-levels">{steps}</ol>'


def _bars(title: str, probabilities: dict[str, float], chosen: str) -> str:
    rows = "".join(
        f'<li class="{"sv-chosen" if name == chosen else ""}"><span class="sv-name">{escape(name)}</span>'
        f'<span class="sv-value">{percent(value)}</span>'
        f'<span class="sv-track" aria-hidden="true"><span style="width:{100 * value:.1f}%"></span></span></li>'
        for name, value in sorted(probabilities.items(), key=lambda item: -item[1])
    )
    return f'<h3 class="sv-sub">{title}</h3><ul class="sv-bars">{rows}</ul>'


def percent(value: float) -> str:
    """A probability with one decimal. A value that would round to 0 or 100 % is shown as a bound instead."""
    if 0 < value < 0.0005:
        return "&lt; 0.1 %"
    if 0.9995 <= value < 1:
        return "&gt; 99.9 %"
    return f"{value:.1%}".replace("%", " %")
