"""A judge that is a language model: asked in words, reminded of the format once, its replies read strictly."""

from abc import abstractmethod

from PIL import Image

from .judge import Judge
from .judgements import JudgeItem, Judgement, Status, add_usage
from .prompt import FORMAT_REMINDER, JudgePrompt, parse_reply

Turn = tuple[str, str]
"""Role and text."""


class ItemRejected(Exception):
    """The endpoint refuses this one item; it may accept others."""


class ModelJudge(Judge):
    """Only a reply in the required format is a score; after one reminder, anything else counts as unparseable."""

    def judge(self, item: JudgeItem, prompt: JudgePrompt, image: Image.Image | None) -> Judgement:
        turns: list[Turn] = [("user", prompt.user)]
        usages, reply = [], ""
        for num_reminders in (0, 1):
            try:
                reply, usage = self.reply(prompt.system, turns, image)
            except ItemRejected as rejection:
                return self._judgement(item, "rejected", usages, reason=str(rejection), num_reminders=num_reminders)
            usages.append(usage)
            parsed = parse_reply(reply, prompt.nonce)
            if parsed is not None:
                score, reason = parsed
                return self._judgement(
                    item, "scored", usages, score=score, reason=reason, reply=reply, num_reminders=num_reminders
                )
            turns += [("assistant", reply or "(empty)"), ("user", FORMAT_REMINDER)]
        return self._judgement(item, "unparseable", usages, reply=reply, num_reminders=1)

    @abstractmethod
    def reply(self, system: str, turns: list[Turn], image: Image.Image | None) -> tuple[str, dict[str, float]]:
        """
        The judge's next words and their usage.

        Args:
            image (`PIL.Image.Image`, *optional*): Belongs to the first turn.

        Raises:
            `ItemRejected`: The item is refused.
        """

    def _judgement(self, item: JudgeItem, status: Status, usages: list[dict], **fields) -> Judgement:
        return Judgement(item.item_id, item.rubric.name, self.name, status, usage=add_usage(usages), **fields)
