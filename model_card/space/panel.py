"""Conversation and verdicts as HTML. Every text that goes in is escaped; nothing is told by colour alone."""

from __future__ import annotations

import base64
import io
from html import escape

THUMBNAIL, SHOWN = 96, 384  # pixels a side, in the audit's table and in the conversation

# Action -> mark, word, what it means for the visitor.
ACTIONS = {
    "allow": ("✓", "Allowed", "Below the policy's threshold; answered normally."),
    "caution": ("i", "Caution", "A low risk; answered with care."),
    "warn": ("!", "Warning", "A clear risk; the answer warns or declines."),
    "refuse": ("✕", "Refused", "A high risk; the policy gives no answer."),
}


def conversation(turns: list, running: bool = False) -> str:
    """
    Questions and answers as plain text. Pictures are our own re-encoded copies, never the uploaded bytes.

    Args:
        turns (`list[Turn]`)
        running (`bool`): Whether the last answer is still growing.
    """
    if not turns:
        return (
            '<div class="sv-chat sv-chat-empty"><p><strong>Ask about a picture</strong></p>'
            "<p>Add one with the paper clip. Later questions may go on about it.</p></div>"
        )
    items = []
    for turn in turns:
        picture = ""
        if turn.picture is not None:
            picture = _picture(turn.picture)
        items.append(f'<li class="sv-user"><span class="sv-who">You</span>{picture}{_text(turn.question)}</li>')
        writing = running and turn is turns[-1]
        answer = _text(turn.answer) if turn.answer else '<p class="sv-busy">Thinking …</p>'
        chip = "" if writing or turn.safety is None or not turn.safety["assessed"] else badge(turn.safety["action"])
        who = f'<span class="sv-who">Model</span>{answer}{chip}'
        items.append(f'<li class="sv-model"{" data-writing" if writing else ""}>{who}</li>')
    busy = "true" if running else "false"
    return f'<ol class="sv-chat" role="log" aria-label="Conversation" aria-busy="{busy}">{"".join(items)}</ol>'


def _picture(picture) -> str:
    # The size is said beforehand: the page scrolls to the end before it has decoded the picture.
    scale = min(240 / max(picture.size), 2)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    style = f"width:{width}px;height:{height}px"
    return f'<img src="{picture.shown}" alt="The picture you sent" style="{style}">'


def _text(text: str) -> str:
    return f'<p class="sv-text">{escape(text)}</p>'


def data_uri(picture, side: int) -> str:
    """A JPEG of at most `side` pixels a side, as an address."""
    small = picture.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def empty() -> str:
    return _card(
        '<p class="sv-empty">Ask a question about a picture. The verdict on the two together appears here, before the '
        "answer.</p>"
    )


def busy(text: str = "Assessing the request …") -> str:
    return _card(f'<p class="sv-empty sv-busy">{escape(text)}</p>')


def notice(text: str) -> str:
    """An error, said where the visitor is looking; empty text clears it."""
    if not text:
        return ""
    return f'<div class="sv-notice" role="alert"><span aria-hidden="true">!</span><p>{escape(text)}</p></div>'


def badge(action: str) -> str:
    mark, word, _ = ACTIONS[action]
    return f'<span class="sv-badge sv-{action}"><span aria-hidden="true">{mark}</span>{word}</span>'


def verdict(safety: dict, policy: str) -> str:
    """
    Args:
        safety (`dict`): A row of `SafetyVerdict.to_list()`; its action is `"off"` where nothing was to be assessed.
        policy (`str`): The name of the policy in force.
    """
    if safety["action"] == "off":
        return _card('<p class="sv-empty">Safety is off: nothing was assessed.</p>', policy)
    if not safety["assessed"]:
        return _card(
            '<p class="sv-empty"><strong>Not assessed.</strong> The safety head judges pictures together with the '
            "question, and there is no picture in this conversation yet.</p>",
            policy,
        )
    if "error" in safety:
        return _card(f'<div class="sv-top">{badge(safety["action"])}</div><p>{escape(safety["error"])}</p>', policy)
    _, _, meaning = ACTIONS[safety["action"]]
    return _card(
        f'<div class="sv-top">{badge(safety["action"])}<span class="sv-meaning">{meaning}</span></div>'
        f'<dl class="sv-facts"><div><dt>Risk score</dt><dd>{_percent(safety["score"])}</dd></div>'
        f"<div><dt>Category</dt><dd>{escape(safety['category'].capitalize())}</dd></div>"
        f"<div><dt>Level</dt><dd>{escape(safety['level'].capitalize())}</dd></div></dl>"
        f"{_levels(safety)}{_bars('Category probabilities', safety['category_probabilities'], safety['category'])}",
        policy,
    )


def policy_line(policy, level_names: list[str]) -> str:
    """What a policy does, in a line of plain text."""
    if not policy.enabled:
        return "Safety is off: answers are the base model's."
    actions = ", ".join(f"{level} → {policy.level_actions.get(level, 'allow')}" for level in level_names[1:])
    special = "; some categories differ" if policy.category_actions or policy.category_risk_thresholds else ""
    return f"Counts as risky from a score of {policy.risk_threshold:.0%}. By level: {actions}{special}."


def audit_table(rows: list[dict], total: int) -> str:
    """
    Args:
        rows (`list[dict]`): `file`, `thumbnail` (a data URI or `""`), and `safety` or `error`.
        total (`int`): Number of pictures when the audit is done.
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
        f'<td>{escape(safety["level"])}</td><td class="sv-number">{_percent(safety["score"])}</td></tr>'
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
        f"<span>{escape(name)}</span><small>{_percent(safety['level_probabilities'][name])}</small></li>"
        for i, name in enumerate(names)
    )
    return f'<h3 class="sv-sub">Level probabilities</h3><ol class="sv-levels">{steps}</ol>'


def _bars(title: str, probabilities: dict[str, float], chosen: str) -> str:
    rows = "".join(
        f'<li class="{"sv-chosen" if name == chosen else ""}"><span class="sv-name">{escape(name)}</span>'
        f'<span class="sv-value">{_percent(value)}</span>'
        f'<span class="sv-track" aria-hidden="true"><span style="width:{100 * value:.1f}%"></span></span></li>'
        for name, value in sorted(probabilities.items(), key=lambda item: -item[1])
    )
    return f'<h3 class="sv-sub">{title}</h3><ul class="sv-bars">{rows}</ul>'


def _percent(value: float) -> str:
    """One decimal; what rounds to nothing or to certainty is said as a bound, since it is neither."""
    if 0 < value < 0.0005:
        return "&lt; 0.1 %"
    if 0.9995 <= value < 1:
        return "&gt; 99.9 %"
    return f"{value:.1%}".replace("%", " %")
