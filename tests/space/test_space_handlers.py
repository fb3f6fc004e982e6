"""The handlers behind the buttons, and stopping, with a model that only counts words."""

import importlib
import threading
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from safevlm import SafetyPolicy

gr = pytest.importorskip("gradio", reason="gradio is not installed; pip install 'safevlm[space]'")

VISITOR = SimpleNamespace(headers={}, client=SimpleNamespace(host="10.0.0.1"))


class WordyModel:
    """Says `words` words, one every `pause` seconds; fails after `fails_after` of them."""

    policies = {"default": SafetyPolicy(), "strict": SafetyPolicy(name="strict")}
    model = SimpleNamespace(config=SimpleNamespace(level_names=["none", "low", "medium", "high"]))

    def __init__(self, words=3, pause=0.0, fails_after=None):
        self.words, self.pause, self.fails_after = words, pause, fails_after
        self.asked, self.closed = [], threading.Semaphore(0)

    def answer(self, turns, policy):
        self.asked.append((len(turns), policy))
        try:
            for count in range(1, self.words + 1):
                time.sleep(self.pause)
                if count == self.fails_after:
                    raise RuntimeError("secret /root/model")
                yield {"assessed": False, "action": "allow"}, " ".join(["word"] * count)
        finally:
            self.closed.release()


@pytest.fixture
def make(modules):
    handlers = importlib.import_module("handlers")

    def make_handlers(model=None, **settings):
        settings = modules.settings.Settings("me/m", **settings)
        limiter = modules.limits.RateLimiter(settings.requests_per_minute)
        return handlers.Handlers(model or WordyModel(), settings, limiter)

    return make_handlers


def ask(handlers, turns=(), question="What?", policy="default", files=()):
    return list(handlers.chat({"text": question, "files": list(files)}, list(turns), policy, VISITOR))


def test_a_chat_keeps_each_answer_for_the_next_question(make):
    handlers = make()
    turns = ask(handlers)[-1][1]
    assert [(turn.question, turn.answer) for turn in turns] == [("What?", "word word word")]
    assert len(ask(handlers, turns)[-1][1]) == 2 and handlers.chat_model.asked == [(1, "default"), (2, "default")]


def test_what_was_stopped_stays_in_the_conversation(make):
    steps = make().chat({"text": "What?", "files": []}, [], "default", VISITOR)
    for _ in range(3):
        _, turns, *_ = next(steps)
    steps.close()
    assert turns[0].answer == "word word"


@pytest.mark.parametrize(
    ("question", "policy", "files", "message"),
    [
        ("What?", "off", [], "not offered here"),
        (" ", "default", [], "Write a question"),
        ("x" * 2001, "default", [], "2001 characters; 2000 are allowed"),
        ("What?", "default", ["/etc/passwd"], "did not arrive"),
        ("What?", "default", ["a", "b"], "one picture per question"),
        ("\ud800 x", "default", [], "a lone surrogate"),
    ],
)
def test_a_refused_question_changes_nothing_but_the_notice(make, question, policy, files, message):
    handlers = make()
    ((*others, notice),) = ask(handlers, (), question, policy, files)
    assert message in notice and handlers.chat_model.asked == []
    assert all(other == gr.skip() for other in others)


def test_no_message_at_all_is_no_question(make):
    for asked in (make().chat(None, [], "default", VISITOR), make().compare(None, "default", VISITOR)):
        assert "Write a question" in list(asked)[-1][-1]


def test_a_failure_shows_a_reference_and_leaves_the_conversation_as_it_was(make):
    model = WordyModel()
    turns = ask(make(model))[-1][1]
    model.fails_after = 2
    *_, (shown, kept, _, _, notice) = ask(make(model), turns)
    assert kept == turns and shown.count('class="sv-user"') == 1
    assert "reference" in notice and "secret" not in notice and "/root" not in notice


def test_conversations_and_rates_are_limited(make):
    handlers = make(max_turns=2, requests_per_minute=4)
    turns = []
    for _ in range(2):
        turns = ask(handlers, turns)[-1][1]
    assert "at most 2 questions" in ask(handlers, turns)[-1][-1]
    ask(handlers)
    assert "Too many requests: 4 a minute" in ask(handlers)[-1][-1]


def test_an_audit_has_a_largest_size_and_counts_once_per_picture(make, tmp_path):
    handlers = make(max_audit_images=2, requests_per_minute=3)
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    for path in files:
        Image.new("RGB", (4, 4)).save(path)
    assert "at most 2 pictures, got 3" in list(handlers.audit(files, "What?", "default", VISITOR))[-1][-1]
    list(handlers.audit(files[:2], "What?", "default", VISITOR))
    assert "Too many requests" in list(handlers.audit(files[:2], "What?", "default", VISITOR))[-1][-1]


def test_a_conversation_keeps_no_decoded_picture(make, tmp_path, monkeypatch):
    """20 questions with a picture of about 10 megapixels each used to take a gigabyte."""
    import pickle

    monkeypatch.setattr("handlers.get_upload_folder", lambda: str(tmp_path))
    Image.effect_noise((1200, 900), 90).save(tmp_path / "large.png")
    turns = ask(make(), files=[str(tmp_path / "large.png")])[-1][1]
    assert len(pickle.dumps(turns)) < 60_000
    assert turns[0].picture.decode().size == turns[0].picture.size == (1200, 900)
    (tmp_path / "large.png").unlink()
    with pytest.raises(Exception, match="Upload it again"):
        turns[0].picture.decode()


def test_the_queue_is_as_long_as_the_operator_says(modules):
    layout = importlib.import_module("layout")
    demo = layout.build_page(WordyModel(), modules.settings.Settings("me/m", queue_size=5, compare=False))
    assert demo._queue.max_size == 5
    assert "Base vs safe" not in str(demo.get_config_file())


@pytest.mark.browser
def test_stopping_starting_anew_and_leaving_end_the_generation(modules, browser):
    layout = importlib.import_module("layout")
    model = WordyModel(words=600, pause=0.1)
    demo = layout.build_page(model, modules.settings.Settings("me/m"))
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)

    def ask_slowly(page):
        page.wait_for_selector("#chat-box .submit-button")
        page.fill("#chat-box textarea", "What?")
        page.press("#chat-box textarea", "Enter")
        page.wait_for_selector("#chat .sv-chat[aria-busy=true] >> text=word word")

    try:
        page = browser.new_page()
        page.goto(url)
        ask_slowly(page)
        page.click("#chat-box .stop-button")
        page.wait_for_selector("#chat .sv-chat[aria-busy=false] >> text=word word")
        assert model.closed.acquire(timeout=20)
        ask_slowly(page)
        page.click("#new-chat")
        page.wait_for_selector("#chat .sv-chat-empty")
        assert model.closed.acquire(timeout=20)
        ask_slowly(page)
        page.close()
        assert model.closed.acquire(timeout=20)
    finally:
        demo.close()
