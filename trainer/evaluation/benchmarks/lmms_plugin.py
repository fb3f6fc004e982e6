"""lmms-eval's access to our models: a chat model named `safevlm`, found through the entry point `lmms_eval.models`.

It takes SafeVLMs and plain vision-language models alike, so that both sides of a comparison run through the same code:

    lmms-eval --model safevlm --model_args pretrained=out/model,policy=strict,answers=out/answers.jsonl --tasks mme

`safevlm evaluate` uses the same class. lmms-eval's own outputs have no place for a verdict, so the answer log keeps it
beside the answer. Batches are planned over all items before any is skipped: a resumed run computes exactly the missing
batches, with the same padding, and ends with the same digits.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm.auto import tqdm

from safevlm.trainer.data import load_image

from .answer_log import AnswerLog
from .answering import Answerer

GENERATION_SETTINGS = ("max_new_tokens", "do_sample", "num_beams", "temperature", "top_p", "top_k", "until")


def manifest() -> ModelManifest:
    """What lmms-eval gets from the entry point."""
    return ModelManifest(model_id="safevlm", chat_class_path=f"{__name__}.SafeVlmLmms")


class SafeVlmLmms(lmms):
    """
    Args:
        pretrained (`str`, *optional*): Folder or Hub id of a SafeVLM or another vision-language model.
        policy, prefix, guard, device, dtype: See [`Answerer.load`].
        batch_size (`int`): Items asked at once.
        answers (`str` or `Path`, *optional*): File of the answer log; items in it are not asked again.
        seed (`int`): Seed of tasks that sample.
        make_answerer (`Callable[[], Answerer]`, *optional*): Used instead of loading `pretrained`. It is called at the
            first missing answer, so a finished run loads no model.
        max_new_tokens (`int`, *optional*): Caps the tasks' own limits.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        policy: str | None = None,
        prefix: str | None = None,
        guard: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        answers=None,
        seed: int = 0,
        make_answerer: Callable[[], Answerer] | None = None,
        max_new_tokens: int | None = None,
        **unknown,
    ):
        super().__init__()
        if unknown := {name: value for name, value in unknown.items() if name != "max_batch_size"}:
            raise ValueError(f"Unknown model argument(s) of `safevlm`: {', '.join(map(repr, unknown))}.")
        if make_answerer is None:
            if pretrained is None:
                raise ValueError("`pretrained` is missing: --model_args pretrained=FOLDER_OR_HUB_ID.")

            def make_answerer():
                return Answerer.load(pretrained, policy, prefix, guard, device, dtype)

        self._make_answerer = make_answerer
        self._answerer = None
        self.batch_size = int(batch_size)
        self.seed = int(seed)
        self.max_new_tokens = max_new_tokens
        self.log = None if answers is None else AnswerLog(answers)
        self.device = torch.device("cpu" if device is None else device)  # lmms-eval gathers counts on it

    def generate_until(self, requests: list[Instance]) -> list[str]:
        answers: list[str | None] = [None] * len(requests)
        batches = [
            (settings, indices[start : start + self.batch_size])
            for settings, indices in _by_settings(requests).items()
            for start in range(0, len(indices), self.batch_size)
        ]
        progress = tqdm(total=len(requests), desc="answers", unit="item", disable=self.rank != 0)
        for settings, indices in batches:
            records = [self._find(requests[i]) for i in indices]
            if not all(records):
                records = self._ask([requests[i] for i in indices], json.loads(settings))
            for i, record in zip(indices, records, strict=True):
                answers[i] = record["answer"]
            progress.update(len(indices))
        progress.close()
        return answers

    def _find(self, request: Instance) -> dict | None:
        if self.log is None:
            return None
        prompt, _, _, doc_id, task, _ = request.args
        return self.log.find(task, doc_id, prompt)

    def _ask(self, requests: list[Instance], settings: dict) -> list[dict]:
        if self._answerer is None:
            self._answerer = self._make_answerer()
        conversations = []
        for request in requests:
            _, doc_to_messages, _, doc_id, task, split = request.args
            conversations.append(hub_conversation(doc_to_messages(self.task_dict[task][split][doc_id])))
        if self.max_new_tokens is not None:
            settings["max_new_tokens"] = min(self.max_new_tokens, settings.get("max_new_tokens", self.max_new_tokens))
        # A seed per batch, so that a resumed run does not depend on how many batches came before.
        torch.manual_seed(_batch_seed(self.seed, requests[0]))
        answers = self._answerer.answer(conversations, **settings)
        records = [
            {
                "task": request.args[4],
                "doc_id": request.args[3],
                "prompt": request.args[0],
                "answer": answer.text,
                "verdict": answer.verdict,
            }
            for request, answer in zip(requests, answers, strict=True)
        ]
        if self.log is not None:
            self.log.add(records)
        return records

    def loglikelihood(self, requests):
        raise NotImplementedError(
            "`safevlm` answers tasks that generate. Scoring given answers would bypass the safety policy, which acts "
            "in generate(); use the generating variant of the task, such as seedbench instead of seedbench_ppl."
        )

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("`safevlm` answers single-round tasks; this one has several rounds.")


def hub_conversation(messages: list[dict]) -> tuple[list[dict], list[Image.Image]]:
    """Separates the images from lmms-eval's messages, and leaves image placeholders in their places."""
    images, converted = [], []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else []
        for part in content if not parts else []:
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image":
                images.append(load_image(_image_source(part["url"])))
                parts.append({"type": "image"})
            else:
                raise ValueError(f"`safevlm` takes images and text, but the task has a part of type {part['type']!r}.")
        converted.append({"role": message["role"], "content": parts})
    return converted, images


def _image_source(value):
    if isinstance(value, dict) and value.get("bytes") is not None:  # an undecoded image of `datasets`
        return value["bytes"]
    if isinstance(value, io.BytesIO):
        return value.getvalue()
    return value


def _by_settings(requests: list[Instance]) -> dict[str, list[int]]:
    """Indices of requests by their generation settings, so by what can share a batch; similar lengths side by side."""
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        settings = dict(request.args[2])
        until = settings.get("until") or []
        settings["until"] = [until] if isinstance(until, str) else list(until)
        # Settings of other model classes (image_aspect_ratio, ...) mean nothing to `generate`.
        settings = {name: settings[name] for name in GENERATION_SETTINGS if settings.get(name) is not None}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(i)
    return {key: sorted(group, key=lambda i: (len(requests[i].args[0]), i)) for key, group in groups.items()}


def _batch_seed(seed: int, request: Instance) -> int:
    digest = hashlib.sha256(f"{seed}:{request.args[4]}:{request.args[3]}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
