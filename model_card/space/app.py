"""Starts the Space: a Gradio page around one SafeVLM, with a chat, a comparison with the base, an audit and an API.

    settings.py       what the operator can set, as environment variables
    layout.py         what stands where on the page
    handlers.py       what a click or an API call does
    chat_model.py     the model: verdicts and streamed answers
    verdict_html.py   verdicts as HTML;  chat_html.py: the conversation;  style.css, theme.py, labels.js: their look
    limits.py         uploads, request rates and errors;  gate.py: checks on every HTTP request

Hugging Face Spaces run this file; `safevlm space` runs it locally.
"""

from __future__ import annotations

import os
from pathlib import Path

from chat_model import ChatModel
from gate import Gate, SecurityHeaders
from gradio.utils import get_upload_folder
from layout import build_page
from limits import RateLimiter
from settings import Settings
from starlette.middleware import Middleware
from theme import page_theme

HERE = Path(__file__).parent
# Conversations kept in memory, a few hundred kilobytes each; the oldest is dropped first.
MAX_SESSIONS = 256


def main():
    settings = Settings.from_environment()
    limiter = RateLimiter(settings.requests_per_minute)
    # uvicorn would trust a header that visitors can write themselves; the gate determines the address instead.
    os.environ["FORWARDED_ALLOW_IPS"] = ""
    gate = Middleware(Gate, settings=settings, limiter=limiter, uploads=get_upload_folder())
    build_page(ChatModel(settings), settings, limiter).launch(
        theme=page_theme(),
        head=f"<script>{(HERE / 'labels.js').read_text(encoding='utf-8')}</script>",
        css_paths=HERE / "style.css",
        footer_links=[],
        max_file_size=settings.max_file_mb * 2**20,
        show_error=False,
        ssr_mode=False,
        state_session_capacity=MAX_SESSIONS,
        app_kwargs={"middleware": [Middleware(SecurityHeaders), gate]},
    )


if __name__ == "__main__":
    main()
