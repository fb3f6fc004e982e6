"""Judges score answers from 0 to 10 by a rubric. They differ in who judges, and share one call: `judge.score(items)`.

Judgements go to a cache on disk as they arrive, and what is there is never asked again.
"""

import hashlib
import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

from PIL import Image
from tqdm import tqdm

from safevlm.trainer.data.images import load_image

from .judgement_cache import JudgementCache
from .judgements import JudgeItem, Judgement
from .prompt import FORMAT_REMINDER, JudgePrompt, build_prompt


class JudgeError(RuntimeError):
    """The judge cannot be asked. Earlier judgements are in the cache; the same call continues from there."""


class Judge(ABC):
    """
    Args:
        name (`str`): Kind and model, as judgements name them.
        parameters (`dict`): Everything that may change a reply; part of the cache's key.
        cache (`str`, `os.PathLike` or `JudgementCache`, *optional*): Where judgements are kept. `None`: in memory.
        concurrency (`int`): How many items are judged at the same time.
    """

    def __init__(
        self,
        name: str,
        parameters: dict,
        cache: str | os.PathLike | JudgementCache | None = None,
        concurrency: int = 1,
    ):
        if concurrency < 1:
            raise ValueError(f"`concurrency` must be at least 1, got {concurrency!r}.")
        self.name, self.parameters, self.concurrency = name, parameters, concurrency
        self.cache = cache if isinstance(cache, JudgementCache) else JudgementCache(cache)

    @abstractmethod
    def judge(self, item: JudgeItem, prompt: JudgePrompt, image: Image.Image | None) -> Judgement:
        """One judgement, without the cache."""

    def score(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        """
        Judges `items`, in their order, with a progress bar on a terminal.

        Raises:
            `JudgeError`: The judge cannot be reached. Judgements so far are kept; call again to continue.
            `ImageError`: An image cannot be read.
        """
        judgements: list[Judgement | None] = [None] * len(items)
        failed = threading.Event()

        def judge_unless_failed(item: JudgeItem) -> Judgement | None:
            if failed.is_set():
                return None
            try:
                return self._cached(item)
            except BaseException:
                failed.set()  # before the next item starts
                raise

        with (
            tqdm(total=len(items), desc=self.name, unit="answer", disable=None) as progress,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            futures = {pool.submit(judge_unless_failed, item): index for index, item in enumerate(items)}
            try:
                for future in as_completed(futures):
                    judgements[futures[future]] = future.result()
                    progress.update()
            finally:  # after an error or Ctrl-C: wait for running requests, start no more
                failed.set()
        return judgements

    def key(self, prompt: JudgePrompt, image: Image.Image | None) -> str:
        """Hash of judge, parameters, prompt and pixels."""
        pixels = None if image is None else hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
        parts = [self.name, self.parameters, prompt.system, prompt.user, FORMAT_REMINDER, pixels]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _cached(self, item: JudgeItem) -> Judgement:
        prompt = build_prompt(item.rubric, item.question, item.answer, item.reference)
        image = None if item.image is None else load_image(item.image, row_id=item.item_id)
        key = self.key(prompt, image)
        judgement = self.cache.get(key)
        if judgement is None:
            judgement = self.judge(item, prompt, image)
            # An endpoint may accept tomorrow what it rejects today, so the next run asks again.
            if judgement.status != "rejected":
                self.cache.add(key, judgement)
        return replace(judgement, item_id=item.item_id, rubric=item.rubric.name)
