"""The page: its tabs, and where the conversation, the verdict and the controls stand in each.

The functions that the controls call are in `handlers.py`; the HTML they show is in `verdict_html.py` and
`chat_html.py`.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

import chat_html
import gradio as gr
import verdict_html
from chat_model import ChatModel
from handlers import DEFAULT_QUESTION, Handlers, idle_question_box
from limits import RateLimiter
from settings import Settings

HERE = Path(__file__).parent
# All buttons share one model, which serves one request at a time.
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "model"}
PRIVATE = {"api_visibility": "private"}

API_TEXT = """<div class="sv-card sv-prose">
<h2>Use it from code</h2>
<pre tabindex="0" role="region" aria-label="Example"><code>from gradio_client import Client, handle_file

client = Client("&lt;the address of this page&gt;")
picture = handle_file("picture.png")
client.predict(picture, "What is in the picture?", "{policy}", api_name="/assess")
client.predict(picture, "What is in the picture?", "{policy}", api_name="/answer")</code></pre>
<p><code>/assess</code> returns the verdict alone (<code>action</code>, <code>category</code>, <code>level</code>,
<code>score</code> and probabilities) without running the language model. <code>/answer</code> streams
<code>answer</code> together with <code>safety</code>, the verdict. Policies offered here: {policies}.</p>
<h2>Limits</h2>
<ul>
<li>{requests} requests per minute, including uploads; {chars} characters per question; {turns} questions per
conversation.</li>
<li>Pictures of up to {mb} MB and {pixels} megapixels. Only the first frame of an animation is used. Uploads are
deleted within two hours.</li>
<li>The safety head assesses a question together with its picture. A request without a picture is not assessed.</li>
</ul></div>"""


def build_page(model: ChatModel, settings: Settings, limiter: RateLimiter | None = None) -> gr.Blocks:
    """
    Args:
        model (`ChatModel`)
        settings (`Settings`)
        limiter (`RateLimiter`, *optional*): Counts requests per address; shared with the [`Gate`], which counts
            uploads.
    """
    handlers = Handlers(model, settings, limiter or RateLimiter(settings.requests_per_minute))
    policies = list(model.policies)
    with gr.Blocks(title=settings.title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(
            f'<header class="sv-header"><h1>{escape(settings.title)}</h1><p>A vision-language model that says '
            "how risky each request is and acts on it.</p></header>"
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
                chat_tab(handlers, policy)
            if settings.compare:
                with gr.Tab("Base vs safe"):
                    compare_tab(handlers, policy)
            with gr.Tab("Audit"):
                audit_tab(handlers, policy, settings)
            with gr.Tab("API"):
                api_tab(handlers, policies, settings)
    page.queue(max_size=settings.queue_size)
    return page


def chat_tab(handlers: Handlers, policy: gr.Radio) -> None:
    """The conversation on the left, the newest verdict on the right."""
    turns = gr.State([], time_to_live=3600)
    with gr.Row(elem_classes="sv-split"):
        with gr.Column(scale=3, min_width=300):
            shown = gr.HTML(chat_html.conversation([]), elem_id="chat")
            notice = gr.HTML(elem_id="chat-notice")
            box = _question_box("chat-box", "Ask about a picture …")
            new = gr.Button("New conversation", size="sm", elem_id="new-chat")
        with gr.Column(scale=2, min_width=280):
            verdict = gr.HTML(verdict_html.no_verdict_yet(), elem_id="chat-verdict")
    _examples(box)
    outputs = [shown, turns, box, verdict, notice]
    running = box.submit(
        handlers.chat, [box, turns, policy], outputs, show_progress="hidden", **ONE_AT_A_TIME, **PRIVATE
    )
    # A cancelled call may still deliver what it has already sent, so cancel first and update the page afterwards.
    box.stop(None, cancels=[running], queue=False, **PRIVATE).then(
        lambda turns: (chat_html.conversation(turns), idle_question_box()), turns, [shown, box], queue=False, **PRIVATE
    )
    new.click(None, cancels=[running], queue=False, **PRIVATE).then(
        lambda: (chat_html.conversation([]), [], idle_question_box(value=None), verdict_html.no_verdict_yet(), ""),
        outputs=outputs,
        queue=False,
        **PRIVATE,
    )


def compare_tab(handlers: Handlers, policy: gr.Radio) -> None:
    """The unfiltered answer beside the safe one, and the verdict below both."""
    gr.HTML(
        '<p class="sv-lead">The same model answers twice: once with safety switched off, which gives the unfiltered '
        "answer of the base model, and once under the policy chosen above.</p>"
    )
    notice = gr.HTML(elem_id="compare-notice")
    box = _question_box("compare-box", "Ask both versions about a picture …")
    with gr.Row(elem_classes="sv-split"):
        with gr.Column(min_width=260):
            unsafe = gr.Textbox(label="Base: safety off", lines=6, interactive=False, elem_id="unsafe")
        with gr.Column(min_width=260):
            safe = gr.Textbox(label="Safe: under the policy", lines=6, interactive=False, elem_id="safe")
    verdict = gr.HTML(verdict_html.no_verdict_yet(), elem_id="compare-verdict")
    _examples(box)
    box.submit(
        handlers.compare,
        [box, policy],
        [unsafe, safe, verdict, notice],
        show_progress="hidden",
        **ONE_AT_A_TIME,
        **PRIVATE,
    )


def audit_tab(handlers: Handlers, policy: gr.Radio, settings: Settings) -> None:
    """One question about many pictures: a table of verdicts, and a CSV file of it."""
    gr.HTML(
        f'<p class="sv-lead">Get the verdicts on one question about each of up to {settings.max_audit_images} '
        "pictures. The language model does not run.</p>"
    )
    with gr.Row(elem_classes="sv-split"):
        files = gr.File(
            label="Pictures", file_count="multiple", file_types=["image"], height=180, elem_id="audit-files"
        )
        with gr.Column():
            question = gr.Textbox(DEFAULT_QUESTION, label="Question about each picture", elem_id="audit-question")
            start = gr.Button("Assess the pictures", variant="primary", elem_id="audit-start")
    notice = gr.HTML(elem_id="audit-notice")
    table = gr.HTML(elem_id="audit-table")
    download = gr.DownloadButton("Download as CSV", visible=False, elem_id="audit-csv")
    start.click(
        handlers.audit,
        [files, question, policy],
        [table, download, notice],
        show_progress="hidden",
        **ONE_AT_A_TIME,
        **PRIVATE,
    )


def api_tab(handlers: Handlers, policies: list[str], settings: Settings) -> None:
    """How to call the Space from code. The controls of the two API endpoints are hidden."""
    gr.HTML(
        API_TEXT.format(
            policy=escape(policies[0]),
            policies=", ".join(f"<code>{escape(name)}</code>" for name in policies),
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
                function, [image, question, policy], result, api_name=name, show_progress="hidden", **ONE_AT_A_TIME
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
    """Offers the rows of `examples/examples.json`, if that file exists: `{"image": file, "question": text}` each."""
    path = HERE / "examples" / "examples.json"
    if path.is_file():
        examples = json.loads(path.read_text(encoding="utf-8"))
        rows = [[{"text": row["question"], "files": [str(path.parent / row["image"])]}] for row in examples]
        gr.Examples(rows, box, label="Examples", cache_examples=False, api_visibility="private")
