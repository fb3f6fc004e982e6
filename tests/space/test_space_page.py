"""The page in headless Chromium: what visitors do, see and get wrong."""

import csv
import io
import json
import struct
import zlib
from pathlib import Path

import pytest
from tiny import BENIGN, RISKY

pytestmark = pytest.mark.browser

REFUSAL = "I can't help with this request: it involves politics."
DONE = "#chat .sv-chat[aria-busy=false]"


class Visit:
    """A visitor's page, and its requests to the network."""

    def __init__(self, page, url):
        self.page, self.url, self.requests, self.errors = page, url, [], []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.set_default_timeout(30_000)
        page.goto(url)
        page.wait_for_selector("#chat-box textarea")

    def ask(self, question, picture=None, box="chat-box"):
        self.page.wait_for_selector(f"#{box} .submit-button")
        if picture is not None:
            self.page.locator(f"#{box} input[type=file]").set_input_files(str(picture))
            self.page.wait_for_selector(f"#{box} .thumbnail-item")
        self.page.fill(f"#{box} textarea", question)
        self.page.press(f"#{box} textarea", "Enter")

    def tab(self, name):
        self.page.get_by_role("tab", name=name).click()

    def text(self, selector):
        return self.page.inner_text(selector)


@pytest.fixture(scope="module")
def contexts(browser):
    """Browser contexts by width and colour scheme; each caches the page's scripts."""
    opened = {}
    yield opened
    for context in opened.values():
        context.close()


@pytest.fixture
def visit(browser, contexts, page):
    """Opens the page; `visit(width=390, dark=True)` on a phone in dark mode."""

    def open_page(width=1280, dark=False):
        if (width, dark) not in contexts:
            phone = {"is_mobile": True, "has_touch": True} if width < 600 else {}
            scheme = "dark" if dark else "light"
            contexts[width, dark] = browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme, **phone
            )
        visits.append(Visit(contexts[width, dark].new_page(), page.url))
        return visits[-1]

    visits = []
    yield open_page
    for visitor in visits:
        visitor.page.close()


def test_a_question_is_answered_with_its_verdict_and_no_other_host_is_asked(visit, example):
    visitor = visit()
    assert "Ask a question about a picture" in visitor.text("#chat-verdict")
    visitor.ask(BENIGN, example)
    visitor.page.wait_for_selector(DONE)
    assert visitor.text("#chat .sv-user .sv-text") == BENIGN
    assert visitor.text("#chat .sv-model .sv-text").strip()
    verdict = visitor.text("#chat-verdict")
    assert "Allowed" in verdict and "Category probabilities" in verdict and "Under the policy “default”" in verdict
    assert visitor.page.locator("#chat-verdict .sv-bars li").count() == 7
    assert visitor.page.locator("#chat .sv-user img").get_attribute("src").startswith("data:image/jpeg;base64,")
    assert visitor.errors == []
    assert [url for url in visitor.requests if not url.startswith((visitor.url, "data:", "blob:"))] == []


def test_a_refusal_streams_word_by_word_after_the_verdict(visit, example):
    visitor = visit()
    visitor.page.evaluate(
        """() => { window.seen = [];
        new MutationObserver(() => {
          const answer = document.querySelector('#chat .sv-model .sv-text');
          const verdict = document.querySelector('#chat-verdict .sv-badge');
          if (answer) window.seen.push([answer.textContent, verdict ? verdict.textContent : '']);
        }).observe(document.body, {childList: true, subtree: true, characterData: true}); }"""
    )
    visitor.ask(RISKY, example)
    visitor.page.wait_for_selector(DONE)
    assert visitor.text("#chat .sv-model .sv-text") == REFUSAL
    assert "Refused" in visitor.text("#chat .sv-model") and "Politics" in visitor.text("#chat-verdict")
    seen = visitor.page.evaluate("window.seen")
    growing = {text for text, _ in seen}
    assert len(growing) > 2 and all(REFUSAL.startswith(text.strip()) for text in growing)
    assert all("Refused" in verdict for _, verdict in seen)


def test_a_later_question_is_about_the_same_picture_and_a_new_conversation_is_not(visit, example):
    visitor = visit()
    visitor.ask(BENIGN, example)
    visitor.page.wait_for_selector(DONE)
    visitor.ask(RISKY)
    visitor.page.wait_for_selector("#chat li:nth-child(4) .sv-refuse")
    visitor.page.click("#new-chat")
    visitor.page.wait_for_selector("#chat .sv-chat-empty")
    visitor.ask(RISKY)
    visitor.page.wait_for_selector("#chat-verdict >> text=Not assessed")


def test_the_policy_can_be_changed_among_those_on_offer(visit, example):
    visitor = visit()
    assert visitor.page.locator("#policy input").count() == 2
    visitor.page.get_by_label("strict", exact=True).check()
    visitor.page.wait_for_selector("#policy >> text=risky from a score of 20%")
    visitor.ask(BENIGN, example)
    visitor.page.wait_for_selector("#chat-verdict >> text=Under the policy “strict”")


def test_base_and_safe_answer_side_by_side(visit, example):
    visitor = visit()
    visitor.tab("Base vs safe")
    visitor.ask(RISKY, example, box="compare-box")
    visitor.page.wait_for_selector("#compare-verdict .sv-refuse")
    visitor.page.wait_for_function("t => document.querySelector('#safe textarea').value === t", arg=REFUSAL)
    unsafe = visitor.page.input_value("#unsafe textarea")
    assert unsafe not in ("", "…", REFUSAL)


def test_an_audit_judges_each_picture_and_gives_a_csv(visit, example, tmp_path):
    formula = tmp_path / "=1+1.png"
    formula.write_bytes(example.read_bytes())
    broken = tmp_path / "broken.png"
    broken.write_bytes(example.read_bytes()[:2000])
    visitor = visit()
    visitor.tab("Audit")
    visitor.page.click("#audit-start")
    visitor.page.wait_for_selector("#audit-notice >> text=Add at least one picture")
    visitor.page.locator("#audit-files input[type=file]").set_input_files([str(example), str(formula), str(broken)])
    visitor.page.wait_for_selector("#audit-files >> text=broken")
    visitor.page.fill("#audit-question textarea, #audit-question input", RISKY)
    visitor.page.click("#audit-start")
    visitor.page.wait_for_selector("#audit-csv")
    assert "3 of 3 pictures: 2 refused · 1 unreadable" in visitor.text("#audit-table")
    assert "damaged or incomplete" in visitor.text("#audit-table tbody tr:nth-child(3)")
    with visitor.page.expect_download() as download:
        visitor.page.click("#audit-csv")
    content = Path(download.value.path()).read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(content)))
    assert [row["action"] for row in rows] == ["refuse", "refuse", ""] and "damaged" in rows[2]["error"]
    assert float(rows[0]["score"]) > 0.9 and not any(row["file"].startswith("=") for row in rows)


def bomb(width=10_000, height=10_000) -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * ((width // 8 + 1) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_bad_files_are_refused_where_the_visitor_looks_and_the_question_is_kept(visit, example, tmp_path):
    broken, large = tmp_path / "broken.png", tmp_path / "bomb.png"
    broken.write_bytes(example.read_bytes()[:2000])
    large.write_bytes(bomb())
    visitor = visit()
    for file, reason in ((broken, "damaged or incomplete"), (large, "too many pixels")):
        visitor.ask(BENIGN, file)
        visitor.page.wait_for_selector(f"#chat-notice [role=alert] >> text={reason}")
        assert visitor.page.input_value("#chat-box textarea") == BENIGN
        assert visitor.page.locator("#chat .sv-chat-empty").is_visible()
        visitor.page.click("#new-chat")
        visitor.page.wait_for_selector("#chat-box .thumbnail-item", state="detached")


def test_real_odd_files_are_shown_upright_or_refused(visit, odd_files):
    visitor = visit()
    loads = {"hopper_orientation_6.jpg": [128, 128], "anim_frame1.webp": [82, 82], "hopper_16bit.pgm": [128, 128]}
    for asked, (name, size) in enumerate(loads.items(), start=1):
        visitor.ask(BENIGN, odd_files / name)
        visitor.page.wait_for_selector(f"{DONE} li:nth-child({2 * asked})")
        picture = visitor.page.locator("#chat .sv-user img").nth(asked - 1)
        assert picture.evaluate("i => i.decode().then(() => [i.naturalWidth, i.naturalHeight])") == size
    for name in ("truncated_jpeg.jpg", "decompression_bomb.gif"):
        visitor.ask(BENIGN, odd_files / name)
        visitor.page.wait_for_selector("#chat-notice [role=alert]")
        visitor.page.click("#new-chat")
        visitor.page.wait_for_selector("#chat-notice [role=alert]", state="detached")


def test_markup_in_a_question_stays_text(visit, example):
    visitor = visit()
    text = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>**b** <safety><image>'
    visitor.ask(text, example)
    visitor.page.wait_for_selector(DONE)
    assert visitor.text("#chat .sv-user .sv-text") == text
    assert visitor.page.evaluate("window.pwned") is None
    assert visitor.page.locator("#chat .sv-user img").count() == 1  # the picture


def test_an_example_fills_the_question_box(visit):
    visitor = visit()
    visitor.page.locator(".gallery-item", has_text=RISKY).first.click()
    visitor.page.wait_for_selector("#chat-box .thumbnail-item")
    visitor.page.press("#chat-box textarea", "Enter")
    visitor.page.wait_for_selector("#chat .sv-model .sv-refuse")


def test_it_can_be_used_by_keyboard_alone(visit):
    visitor = visit()
    visitor.page.wait_for_selector(".gallery-item")
    reached = []
    for _ in range(25):
        visitor.page.keyboard.press("Tab")
        reached.append(
            visitor.page.evaluate(
                "(({ariaLabel, textContent, value}) => (ariaLabel || textContent || value || '').trim())"
                "(document.activeElement)"
            )
        )
    for name in ("default", "Chat", "Upload a file", "Your question", "Submit", "New conversation"):
        assert name in reached, (name, reached)
    assert any(RISKY in name for name in reached)


# Accessible names, as far as ours need the rules; contrast of text against the background painted behind it.
AXE = """() => {
  const visible = e => e.checkVisibility({opacityProperty: true, visibilityProperty: true})
    && e.getClientRects().length;
  const name = e => (e.getAttribute('aria-label') || (e.labels && [...e.labels].map(l => l.textContent).join(' '))
    || (e.tagName === 'BUTTON' || e.getAttribute('role') === 'tab' ? e.textContent : '') || e.title || '').trim();
  const controls = [...document.querySelectorAll('button, input, textarea, select, [role=tab]')]
    .filter(e => e.type === 'file' ? e.closest('.block').checkVisibility() : visible(e));
  const unnamed = controls.filter(e => !name(e)).map(e => e.outerHTML.slice(0, 160));
  const images = [...document.images].filter(i => i.closest('.sv-chat') && !i.alt).map(i => i.outerHTML.slice(0, 80));
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255]; };
  const over = (top, below) => top.slice(0, 3).map((c, i) => c * top[3] + below[i] * (1 - top[3]));
  const painted = e => { const layers = [];
    for (let n = e; n; n = n.parentElement) layers.push(rgba(getComputedStyle(n).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]); };
  const light = colour => { const [r, g, b] = colour.map(c => c / 255)
    .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const faint = [];
  for (const e of document.querySelectorAll('main.contain *, .main *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !visible(e) || e.closest('svg, script, style, [disabled]')) continue;
    const style = getComputedStyle(e), ground = painted(e), ink = over(rgba(style.color), ground);
    const [hi, lo] = [light(ink), light(ground)].sort((a, b) => b - a);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const ratio = (hi + 0.05) / (lo + 0.05);
    if (ratio < (large ? 3 : 4.5)) faint.push([e.textContent.trim().slice(0, 40), Math.round(ratio * 100) / 100]);
  }
  return {unnamed, images, faint, width: Math.max(document.documentElement.scrollWidth, window.innerWidth),
          title: document.title, h1: document.querySelectorAll('h1').length, lang: document.documentElement.lang};
}"""


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_every_control_has_a_name_every_text_can_be_read_and_nothing_is_cut(visit, example, width, dark):
    visitor = visit(width, dark)
    visitor.ask(RISKY, example)
    visitor.page.wait_for_selector(DONE)
    for tab in ("Chat", "Base vs safe", "Audit", "API"):
        visitor.tab(tab)
        visitor.page.wait_for_selector(f"[role=tab][aria-selected=true] >> text={tab}")
        if tab == "Audit":
            visitor.page.locator("#audit-files input[type=file]").set_input_files(str(example))
            visitor.page.wait_for_selector("#audit-files >> text=example")
            visitor.page.click("#audit-start")
            visitor.page.wait_for_selector("#audit-csv")
        found = visitor.page.evaluate(AXE)
        assert found["unnamed"] == [] and found["images"] == [], (tab, json.dumps(found))
        assert found["faint"] == [], (tab, found["faint"])
        assert found["width"] <= width and found["h1"] == 1 and found["title"] == "SafeVLM" and found["lang"], tab
