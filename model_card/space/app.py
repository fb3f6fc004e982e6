"""A Gradio page around one SafeVLM: chat with the verdict beside it, base against safe, an audit of many pictures.

Run by Spaces, or locally by `safevlm space`. Layout only; settings.py lists what the operator decides, handlers.py
says what happens on a click, engine.py asks the model, guards.py and gate.py hold the limits.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import gradio as gr
import panel
from engine import Engine
from gate import Gate, SecurityHeaders
from gradio.utils import get_upload_folder
from guards import RateLimiter
from handlers import DEFAULT_QUESTION, Handlers, question_ready
from settings import Settings
from starlette.middleware import Middleware

HERE = Path(__file__).parent
# Conversations kept at a time, each some hundred kilobytes of text and small pictures; the oldest is forgotten.
MAX_SESSIONS = 256
SYSTEM_FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
# One request at a time asks the model, whichever button it came from.
ONE_MODEL = {"concurrency_limit": 1, "concurrency_id": "model"}
PRIVATE = {"api_visibility": "private"}

API_TEXT = """<div class="sv-card sv-prose">
<h2>Use it from code</h2>
<pre tabindex="0" role="region" aria-label="Example"><code>from gradio_client import Client, handle_file

client = Client("&lt;the address of this page&gt;")
picture = handle_file("picture.png")
client.predict(picture, "What is in the picture?", "{policy}", api_name="/assess")
client.predict(picture, "What is in the picture?", "{policy}", api_name="/answer")</code></pre>
<p><code>/assess</code> gives the verdict alone (<code>action</code>, <code>category</code>, <code>level</code>,
<code>score</code> and probabilities); the language model does not run. <code>/answer</code> gives
<code>answer</code> and <code>safety</code>, and streams. Policies offered here: {policies}.</p>
<h2>Limits</h2>
<ul>
<li>{requests} requests a minute, uploads included; {chars} characters a question; {turns} questions a
conversation.</li>
<li>Pictures up to {mb} MB and {pixels} megapixels; of animations the first frame is used. Uploads are deleted
within two hours.</li>
<li>The safety head judges pictures with their question. A request without a picture is not assessed.</li>
</ul></div>"""


def build(engine: Engine, settings: Settings, limiter: RateLimiter | None = None) -> gr.Blocks:
    handlers = Handlers(engine, settings, limiter or RateLimiter(settings.requests_per_minute))
    policies = list(engine.policies)
    with gr.Blocks(title=settings.title, analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.HTML(
            f'<header class="sv-header"><h1>{panel.escape(settings.title)}</h1><p>A vision-language model that says '
            "how risky a request is, and acts on it.</p></header>"
        )
        policy = gr.Radio(
            policies,
            value=policies[0],
            label="Safety policy",
            info=handlers.describe_policy(policies[0]),
            interactive=True,
            elem_id="policy",
        )
        policy.input(
            lambda name: gr.Radio(info=handlers.describe_policy(name)),
            policy,
            policy,
            show_progress="hidden",
            queue=False,
            **PRIVATE,
        )
        with gr.Tabs():
            with gr.Tab("Chat"):
                _chat_tab(handlers, policy)
            if settings.compare:
                with gr.Tab("Base vs safe"):
                    _compare_tab(handlers, policy)
            with gr.Tab("Audit"):
                _audit_tab(handlers, policy, settings)
            with gr.Tab("API"):
                _api_tab(handlers, policies, settings)
    demo.queue(max_size=settings.queue_size)
    return demo


def _chat_tab(handlers: Handlers, policy: gr.Radio):
    turns = gr.State([], time_to_live=3600)
    with gr.Row(elem_classes="sv-split"):
        with gr.Column(scale=3, min_width=300):
            shown = gr.HTML(panel.conversation([]), elem_id="chat")
            notice = gr.HTML(elem_id="chat-notice")
            box = _question_box("chat-box", "Ask about a picture …")
            new = gr.Button("New conversation", size="sm", elem_id="new-chat")
        with gr.Column(scale=2, min_width=280):
            verdict = gr.HTML(panel.empty(), elem_id="chat-verdict")
    _examples(box)
    outputs = [shown, turns, box, verdict, notice]
    asked = box.submit(handlers.chat, [box, turns, policy], outputs, show_progress="hidden", **ONE_MODEL, **PRIVATE)
    # What a cancelled call has already sent may still arrive: first cancel, then show.
    box.stop(None, cancels=[asked], queue=False, **PRIVATE).then(
        lambda turns: (panel.conversation(turns), question_ready()), turns, [shown, box], queue=False, **PRIVATE
    )
    new.click(None, cancels=[asked], queue=False, **PRIVATE).then(
        lambda: (panel.conversation([]), [], question_ready(value=None), panel.empty(), ""),
        outputs=outputs,
        queue=False,
        **PRIVATE,
    )


def _compare_tab(handlers: Handlers, policy: gr.Radio):
    gr.HTML(
        '<p class="sv-lead">The same model twice: without any safety step, which gives its base\'s unfiltered answer, '
        "and under the policy chosen above.</p>"
    )
    notice = gr.HTML(elem_id="compare-notice")
    box = _question_box("compare-box", "Ask both about a picture …")
    with gr.Row(elem_classes="sv-split"):
        with gr.Column(min_width=260):
            unsafe = gr.Textbox(label="Base: safety off", lines=6, interactive=False, elem_id="unsafe")
        with gr.Column(min_width=260):
            safe = gr.Textbox(label="Safe: under the policy", lines=6, interactive=False, elem_id="safe")
    verdict = gr.HTML(panel.empty(), elem_id="compare-verdict")
    _examples(box)
    box.submit(
        handlers.compare,
        [box, policy],
        [unsafe, safe, verdict, notice],
        show_progress="hidden",
        **ONE_MODEL,
        **PRIVATE,
    )


def _audit_tab(handlers: Handlers, policy: gr.Radio, settings: Settings):
    gr.HTML(
        f'<p class="sv-lead">Judge up to {settings.max_audit_images} pictures with one question. The language model '
        "does not run.</p>"
    )
    with gr.Row(elem_classes="sv-split"):
        files = gr.File(
            label="Pictures", file_count="multiple", file_types=["image"], height=180, elem_id="audit-files"
        )
        with gr.Column():
            question = gr.Textbox(DEFAULT_QUESTION, label="Question to judge them with", elem_id="audit-question")
            start = gr.Button("Assess the pictures", variant="primary", elem_id="audit-start")
    notice = gr.HTML(elem_id="audit-notice")
    table = gr.HTML(elem_id="audit-table")
    download = gr.DownloadButton("Download as CSV", visible=False, elem_id="audit-csv")
    start.click(
        handlers.audit,
        [files, question, policy],
        [table, download, notice],
        show_progress="hidden",
        **ONE_MODEL,
        **PRIVATE,
    )


def _api_tab(handlers: Handlers, policies: list[str], settings: Settings):
    gr.HTML(
        API_TEXT.format(
            policy=panel.escape(policies[0]),
            policies=", ".join(f"<code>{panel.escape(name)}</code>" for name in policies),
            requests=settings.requests_per_minute,
            chars=settings.max_question_chars,
            turns=settings.max_turns,
            mb=settings.max_file_mb,
            pixels=settings.max_megapixels,
        )
    )
    with gr.Group(visible=False):
        image = gr.File(label="image")
        question = gr.Textbox(label="question")
        policy = gr.Textbox(policies[0], label="policy")
        result = gr.JSON(label="result")
        for name, function in (("assess", handlers.api_assess), ("answer", handlers.api_answer)):
            gr.Button(name).click(
                function, [image, question, policy], result, api_name=name, show_progress="hidden", **ONE_MODEL
            )


def _question_box(elem_id: str, placeholder: str) -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(
        label="Your question",
        placeholder=placeholder,
        file_types=["image"],
        file_count="single",
        sources=["upload"],
        show_label=False,
        elem_id=elem_id,
    )


def _examples(box: gr.MultimodalTextbox):
    """`examples/examples.json`, where there is one: a list of `{"image": file, "question": text}`."""
    path = HERE / "examples" / "examples.json"
    if path.is_file():
        examples = json.loads(path.read_text(encoding="utf-8"))
        rows = [[{"text": row["question"], "files": [str(path.parent / row["image"])]}] for row in examples]
        gr.Examples(rows, box, label="Examples", cache_examples=False, api_visibility="private")


def _theme() -> gr.themes.Base:
    """Soft, with the fonts of the visitor's system and tones dark enough to read."""
    theme = gr.themes.Soft(primary_hue="teal", neutral_hue="slate", font=SYSTEM_FONT, font_mono=["monospace"])
    return theme.set(
        body_background_fill="*neutral_100",
        block_background_fill="white",
        block_border_width="1px",
        block_border_color="*neutral_300",
        block_border_color_dark="*neutral_700",
        block_shadow="none",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        color_accent="*primary_700",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_300",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_title_text_color="*neutral_600",
        block_title_text_color_dark="*neutral_300",
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_padding="0",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        checkbox_label_background_fill_selected="*primary_700",
        checkbox_label_background_fill_selected_dark="*primary_700",
        checkbox_background_color_selected="*primary_800",
        checkbox_background_color_selected_dark="*primary_800",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )


def main():
    settings = Settings.from_environment()
    limiter = RateLimiter(settings.requests_per_minute)
    # uvicorn would take a visitor's address from a header that the visitor wrote; the gate reads it.
    os.environ["FORWARDED_ALLOW_IPS"] = ""
    gate = Middleware(Gate, settings=settings, limiter=limiter, uploads=get_upload_folder())
    build(Engine(settings), settings, limiter).launch(
        theme=_theme(),
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
