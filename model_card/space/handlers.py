"""What happens on each button and API call: check, ask the engine, show. No layout here, no model code."""

from __future__ import annotations

import csv
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import panel
from engine import OFF, Engine, Picture, Turn
from gradio.utils import get_upload_folder
from guards import RateLimiter, Refused, explain, read_picture
from settings import Settings

DEFAULT_QUESTION = "Describe this image."
AUDIT_FIELDS = ("file", "action", "category", "level", "score", "error")


class Handlers:
    def __init__(self, engine: Engine, settings: Settings, limiter: RateLimiter):
        self.engine, self.settings, self.limiter = engine, settings, limiter

    # -- the page ----------------------------------------------------------------------------------------------------

    def chat(self, message: dict | None, turns: list[Turn], policy: str, request: gr.Request):
        """Yields the conversation as shown and as kept, question box, verdict, notice."""
        asked = turns
        try:
            self._admit(request, policy)
            if len(turns) >= self.settings.max_turns:
                raise Refused(f"A conversation has at most {self.settings.max_turns} questions. Start a new one.")
            turn = self._turn(message)
            turns = [*turns, turn]
            running = gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)
            yield panel.conversation(turns, running=True), turns, running, panel.busy(), ""
            for turn.safety, turn.answer in self.engine.answer(turns, policy):
                shown = panel.conversation(turns, running=True)
                yield shown, turns, gr.skip(), panel.verdict(turn.safety, policy), gr.skip()
            yield panel.conversation(turns), turns, question_ready(), gr.skip(), gr.skip()
        except Exception as error:
            notice = panel.notice(explain(error))
            if turns is asked:  # nothing was begun: the visitor can mend the question where it is
                yield gr.skip(), gr.skip(), gr.skip(), gr.skip(), notice
            else:
                yield panel.conversation(asked), asked, question_ready(), panel.empty(), notice

    def compare(self, message: dict | None, policy: str, request: gr.Request):
        """Yields the answer without safety, the safe one, the verdict, and a notice."""
        try:
            self._admit(request, policy, cost=2)
            turn = self._turn(message)
            yield "…", "", panel.busy(), ""
            for _, unsafe in self.engine.answer([turn], OFF):
                yield unsafe or "…", "", gr.skip(), gr.skip()
            for safety, safe in self.engine.answer([turn], policy):
                yield gr.skip(), safe or "…", panel.verdict(safety, policy), gr.skip()
        except Exception as error:
            yield "", "", panel.empty(), panel.notice(explain(error))

    def audit(self, files: list[str] | None, question: str, policy: str, request: gr.Request):
        """Yields the table so far, the CSV's button, and a notice."""
        hidden = gr.DownloadButton(visible=False)
        rows: list[dict] = []
        try:
            if not files:
                raise Refused("Add at least one picture.")
            if len(files) > self.settings.max_audit_images:
                raise Refused(f"An audit takes at most {self.settings.max_audit_images} pictures, got {len(files)}.")
            self._admit(request, policy, cost=len(files))
            question = self._question(question or DEFAULT_QUESTION)
            yield panel.busy("Assessing the pictures …"), hidden, ""
            for row in self._audit_rows(files, question, policy):
                rows.append(row)
                yield panel.audit_table(rows, len(files)), hidden, gr.skip()
            yield gr.skip(), gr.DownloadButton(value=write_csv(rows), visible=True), gr.skip()
        except Exception as error:
            table = panel.audit_table(rows, len(files)) if rows else ""
            yield table, hidden, panel.notice(explain(error))

    def _audit_rows(self, files, question, policy) -> Iterator[dict]:
        for file in files:
            row = {"file": Path(file).name, "thumbnail": ""}
            try:
                picture = self._picture([file], panel.THUMBNAIL)
            except Refused as error:
                yield {**row, "error": str(error)}
                continue
            row["thumbnail"] = picture.shown
            for row["safety"] in self.engine.assess([Turn(question, picture)], policy):
                yield row

    def describe_policy(self, policy: str) -> str:
        levels = self.engine.model.config.level_names
        return panel.policy_line(self.engine.policies[policy], levels) if policy in self.engine.policies else ""

    # -- the API -----------------------------------------------------------------------------------------------------

    def api_assess(self, image: str, question: str, policy: str, request: gr.Request) -> dict:
        """The verdict on a picture and a question; the language model does not run."""
        try:
            self._admit(request, policy)
            turn = Turn(self._question(question), self._picture([image] if image else []))
            return next(iter(self.engine.assess([turn], policy)))
        except Exception as error:
            raise _for_clients(error) from None

    def api_answer(self, image: str | None, question: str, policy: str, request: gr.Request) -> Iterator[dict]:
        """The answer, as it grows, and the verdict beside it."""
        try:
            self._admit(request, policy)
            turn = Turn(self._question(question), self._picture([image] if image else []))
            for safety, answer in self.engine.answer([turn], policy):
                yield {"answer": answer, "safety": safety}
        except Exception as error:
            raise _for_clients(error) from None

    # -- checks ------------------------------------------------------------------------------------------------------

    def _admit(self, request: gr.Request, policy: str, cost: int = 1):
        if policy not in self.engine.policies:
            allowed = ", ".join(self.engine.policies)
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
            raise Refused("The question holds half of a character (a lone surrogate). Write it once more.")
        return text

    def _picture(self, files: list[str], side: int = panel.SHOWN) -> Picture | None:
        if not files:
            return None
        if len(files) > 1:
            raise Refused("Send one picture per question.")
        limits = self.settings.max_file_mb, self.settings.max_megapixels
        decode = functools.partial(read_picture, files[0], get_upload_folder(), *limits)
        image = decode()  # what cannot be read is refused here, before the question waits for the model
        return Picture(decode, image.size, panel.data_uri(image, side))


def question_ready(**changes) -> gr.MultimodalTextbox:
    """The question box when nothing is running."""
    return gr.MultimodalTextbox(submit_btn=True, stop_btn=False, **changes)


def write_csv(rows: list[dict]) -> str:
    """An audit as a CSV file. A leading quote keeps spreadsheets from running a file name as a formula."""
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
