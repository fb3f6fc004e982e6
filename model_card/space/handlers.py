"""What a click or an API call does: check the request, ask the model, show the outcome."""

from __future__ import annotations

import csv
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import chat_html
import gradio as gr
import verdict_html
from chat_model import OFF, ChatModel, Picture, Turn
from gradio.utils import get_upload_folder
from limits import RateLimiter, Refused, explain, read_picture
from settings import Settings

DEFAULT_QUESTION = "Describe this image."
AUDIT_FIELDS = ("file", "action", "category", "level", "score", "error")


class Handlers:
    """
    Args:
        chat_model (`ChatModel`)
        settings (`Settings`)
        limiter (`RateLimiter`): Counts requests per network address.
    """

    def __init__(self, chat_model: ChatModel, settings: Settings, limiter: RateLimiter):
        self.chat_model, self.settings, self.limiter = chat_model, settings, limiter

    # -- the page ----------------------------------------------------------------------------------------------------

    def chat(self, message: dict | None, turns: list[Turn], policy: str, request: gr.Request):
        """Yields the conversation's HTML, its turns, the question box, the verdict's HTML and the notice."""
        previous_turns = turns
        try:
            self._admit(request, policy)
            if len(turns) >= self.settings.max_turns:
                raise Refused(f"A conversation has at most {self.settings.max_turns} questions. Start a new one.")
            turn = self._turn(message)
            turns = [*turns, turn]
            running = gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)
            yield chat_html.conversation(turns, running=True), turns, running, verdict_html.assessing(), ""
            for turn.safety, turn.answer in self.chat_model.answer(turns, policy):
                shown = chat_html.conversation(turns, running=True)
                yield shown, turns, gr.skip(), verdict_html.verdict(turn.safety, policy), gr.skip()
            yield chat_html.conversation(turns), turns, idle_question_box(), gr.skip(), gr.skip()
        except Exception as error:
            notice = chat_html.notice(explain(error))
            if turns is previous_turns:  # refused before it started: the question stays in its box to be corrected
                yield gr.skip(), gr.skip(), gr.skip(), gr.skip(), notice
            else:
                shown, verdict = chat_html.conversation(previous_turns), verdict_html.no_verdict_yet()
                yield shown, previous_turns, idle_question_box(), verdict, notice

    def compare(self, message: dict | None, policy: str, request: gr.Request):
        """Yields the unfiltered answer, the safe one, the verdict's HTML and the notice."""
        try:
            self._admit(request, policy, cost=2)
            turn = self._turn(message)
            yield "…", "", verdict_html.assessing(), ""
            for _, unsafe in self.chat_model.answer([turn], OFF):
                yield unsafe or "…", "", gr.skip(), gr.skip()
            for safety, safe in self.chat_model.answer([turn], policy):
                yield gr.skip(), safe or "…", verdict_html.verdict(safety, policy), gr.skip()
        except Exception as error:
            yield "", "", verdict_html.no_verdict_yet(), chat_html.notice(explain(error))

    def audit(self, files: list[str] | None, question: str, policy: str, request: gr.Request):
        """Yields the table so far, the button that downloads the CSV file, and the notice."""
        hidden = gr.DownloadButton(visible=False)
        rows: list[dict] = []
        try:
            if not files:
                raise Refused("Add at least one picture.")
            if len(files) > (limit := self.settings.max_audit_images):
                raise Refused(f"An audit takes at most {limit} pictures, got {len(files)}. Remove some.")
            self._admit(request, policy, cost=len(files))
            question = self._question(question or DEFAULT_QUESTION)
            yield verdict_html.assessing("Assessing the pictures …"), hidden, ""
            for row in self._audit_rows(files, question, policy):
                rows.append(row)
                yield verdict_html.audit_table(rows, len(files)), hidden, gr.skip()
            yield gr.skip(), gr.DownloadButton(value=write_csv(rows), visible=True), gr.skip()
        except Exception as error:
            table = verdict_html.audit_table(rows, len(files)) if rows else ""
            yield table, hidden, chat_html.notice(explain(error))

    def _audit_rows(self, files, question, policy) -> Iterator[dict]:
        for file in files:
            row = {"file": Path(file).name, "thumbnail": ""}
            try:
                picture = self._picture([file], verdict_html.THUMBNAIL_SIDE)
            except Refused as error:
                yield {**row, "error": str(error)}
                continue
            row["thumbnail"] = picture.shown
            for row["safety"] in self.chat_model.assess([Turn(question, picture)], policy):
                yield row

    def describe_policy(self, policy: str) -> str:
        """What the policy of that name does, in one line; empty if it is not on offer."""
        if policy not in self.chat_model.policies:
            return ""
        return verdict_html.policy_line(self.chat_model.policies[policy], self.chat_model.model.config.level_names)

    # -- the API -----------------------------------------------------------------------------------------------------

    def api_assess(self, image: str, question: str, policy: str, request: gr.Request) -> dict:
        """The verdict on a picture and a question. The language model does not run."""
        try:
            self._admit(request, policy)
            turn = Turn(self._question(question), self._picture([image] if image else []))
            return next(iter(self.chat_model.assess([turn], policy)))
        except Exception as error:
            raise _for_clients(error) from None

    def api_answer(self, image: str | None, question: str, policy: str, request: gr.Request) -> Iterator[dict]:
        """Yields the growing answer together with the verdict."""
        try:
            self._admit(request, policy)
            turn = Turn(self._question(question), self._picture([image] if image else []))
            for safety, answer in self.chat_model.answer([turn], policy):
                yield {"answer": answer, "safety": safety}
        except Exception as error:
            raise _for_clients(error) from None

    # -- checks ------------------------------------------------------------------------------------------------------

    def _admit(self, request: gr.Request, policy: str, cost: int = 1):
        if policy not in self.chat_model.policies:
            allowed = ", ".join(self.chat_model.policies)
            raise Refused(f"This policy is not offered here. Choose one of: {allowed}.")
        self.limiter.check(request.client.host if request.client else "unknown", cost)

    def _turn(self, message: dict | None) -> Turn:
        message = message or {"text": "", "files": []}
        return Turn(self._question(message["text"]), self._picture(message["files"]))

    def _question(self, text: str | None) -> str:
        text = (text or "").strip()
        if not text:
            raise Refused("Write a question.")
        if len(text) > self.settings.max_question_chars:
            raise Refused(
                f"The question has {len(text)} characters; {self.settings.max_question_chars} are allowed. Shorten it."
            )
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise Refused("The question contains a broken character (a lone surrogate). Type it again.")
        return text

    def _picture(self, files: list[str], side: int = chat_html.SHOWN_SIDE) -> Picture | None:
        if not files:
            return None
        if len(files) > 1:
            raise Refused("Send one picture per question.")
        limits = self.settings.max_file_mb, self.settings.max_megapixels
        decode = functools.partial(read_picture, files[0], get_upload_folder(), *limits)
        image = decode()  # an unreadable picture is refused now, before the question waits for the model
        return Picture(decode, image.size, chat_html.data_uri(image, side))


def idle_question_box(**changes) -> gr.MultimodalTextbox:
    """The question box while no answer is running."""
    return gr.MultimodalTextbox(submit_btn=True, stop_btn=False, **changes)


def write_csv(rows: list[dict]) -> str:
    """An audit as a CSV file. A leading quote stops spreadsheets from running a file name as a formula."""
    folder = Path(tempfile.mkdtemp(dir=get_upload_folder()))
    path = folder / "safevlm-audit.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, AUDIT_FIELDS, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            name = f"'{row['file']}" if row["file"].startswith(("=", "+", "-", "@", "\t", "\r")) else row["file"]
            writer.writerow({**row.get("safety", {}), "file": name, "error": row.get("error", "")})
    return str(path)


def _for_clients(error: Exception) -> gr.Error:
    return gr.Error(explain(error), print_exception=False)
