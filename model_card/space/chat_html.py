"""The conversation as HTML. Every text is escaped, and pictures are the Space's own small copies."""

from __future__ import annotations

import base64
import io
from html import escape

from verdict_html import badge

SHOWN_SIDE = 384  # longest side of a picture in the conversation, in pixels


def conversation(turns: list, running: bool = False) -> str:
    """
    Questions and answers as plain text, each answer with the action of its verdict.

    Args:
        turns (`list[Turn]`)
        running (`bool`): Whether the last answer is still being written.
    """
    if not turns:
        return (
            '<div class="sv-chat sv-chat-empty"><p><strong>Ask about a picture</strong></p>'
            "<p>Attach one with the paper clip. Follow-up questions can refer to it.</p></div>"
        )
    items = []
    for turn in turns:
        picture = "" if turn.picture is None else _picture(turn.picture)
        items.append(f'<li class="sv-user"><span class="sv-who">You</span>{picture}{_text(turn.question)}</li>')
        growing = running and turn is turns[-1]
        answer = _text(turn.answer) if turn.answer else '<p class="sv-busy">Thinking …</p>'
        chip = "" if growing or turn.safety is None or not turn.safety["assessed"] else badge(turn.safety["action"])
        content = f'<span class="sv-who">Model</span>{answer}{chip}'
        items.append(f'<li class="sv-model"{" data-writing" if growing else ""}>{content}</li>')
    busy = "true" if running else "false"
    return f'<ol class="sv-chat" role="log" aria-label="Conversation" aria-busy="{busy}">{"".join(items)}</ol>'


def notice(text: str) -> str:
    """An error message next to the control that caused it; an empty text removes it."""
    if not text:
        return ""
    return f'<div class="sv-notice" role="alert"><span aria-hidden="true">!</span><p>{escape(text)}</p></div>'


def data_uri(picture, side: int = SHOWN_SIDE) -> str:
    """A JPEG copy whose longest side has at most `side` pixels, as a data URI."""
    small = picture.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _picture(picture) -> str:
    # With explicit sizes the page can scroll to the end before it has decoded the picture.
    scale = min(240 / max(picture.size), 2)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    style = f"width:{width}px;height:{height}px"
    return f'<img src="{picture.shown}" alt="The picture you sent" style="{style}">'


def _text(text: str) -> str:
    return f'<p class="sv-text">{escape(text)}</p>'
