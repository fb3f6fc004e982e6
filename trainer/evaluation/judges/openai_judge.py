"""A judge behind an OpenAI-compatible endpoint."""

import base64
import io
import json
import os
import re
from dataclasses import dataclass

from PIL import Image

from safevlm.trainer.evaluation.eval_extra import require

from .judge import JudgeError
from .judgement_cache import JudgementCache
from .model_judge import ItemRejected, ModelJudge, Turn

# A "bad request" has many reasons; these lie in one item rather than in how every item is sent.
_ABOUT_THE_ITEM = re.compile(r"content.?(?:filter|policy|management)|moderation|invalid_prompt|context.?length", re.I)


@dataclass(frozen=True)
class RequestSettings:
    """
    Args:
        temperature (`float`, *optional*), max_tokens (`int`, *optional*), seed (`int`, *optional*): Sent with the
            request; `None` leaves one out.
        timeout (`float`): Seconds until a request counts as failed.
        max_retries (`int`): Tries after the first one.
        max_image_side (`int`): Larger images are scaled down until their longer side has this many pixels.
    """

    temperature: float | None = 0.0
    max_tokens: int | None = 512
    seed: int | None = 0
    timeout: float = 60.0
    max_retries: int = 6
    max_image_side: int = 1536

    def sampling(self) -> dict[str, float | int]:
        """What is sent with the request."""
        options = {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": self.seed}
        return {name: value for name, value in options.items() if value is not None}


class OpenAiJudge(ModelJudge):
    """
    Any endpoint that speaks OpenAI's chat completions: OpenAI, vLLM, SGLang, llama.cpp, OpenRouter, ...

    The client retries failures that may be temporary (408, 409, 429, 5xx, timeouts, lost connections) with growing
    pauses, and waits as long as a `Retry-After` header asks for.

    Args:
        model (`str`): The model's name at the endpoint.
        base_url (`str`, *optional*): Such as `"http://localhost:8000/v1"`; by default OpenAI's.
        api_key_variable (`str`): The environment variable that holds the key. It may be missing if `base_url` is
            given: local servers need no key.
        cache, concurrency: See [`Judge`].
        request: Fields of [`RequestSettings`].
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_variable: str = "OPENAI_API_KEY",
        cache: str | os.PathLike | JudgementCache | None = None,
        concurrency: int = 8,
        **request,
    ):
        require("openai", "OpenAiJudge needs the client")
        import openai

        api_key = os.environ.get(api_key_variable)
        if not api_key and base_url is None:
            raise ValueError(f"Set the environment variable {api_key_variable} to your API key, or give `base_url`.")
        self.model, self.settings = model, RequestSettings(**request)
        parameters = {**self.settings.sampling(), "max_image_side": self.settings.max_image_side}
        super().__init__(f"openai:{model}", parameters, cache, concurrency)
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=api_key or "none",
            timeout=self.settings.timeout,
            max_retries=self.settings.max_retries,
        )

    def reply(self, system: str, turns: list[Turn], image: Image.Image | None) -> tuple[str, dict[str, float]]:
        import openai

        messages: list[dict] = [{"role": "system", "content": system}]
        messages += [{"role": role, "content": text} for role, text in turns]
        if image is not None:
            picture = {"type": "image_url", "image_url": {"url": data_url(image, self.settings.max_image_side)}}
            messages[1]["content"] = [picture, {"type": "text", "text": turns[0][1]}]
        try:
            completion = self._client.chat.completions.create(
                model=self.model, messages=messages, stream=False, **self.settings.sampling()
            )
        except openai.BadRequestError as error:
            if _ABOUT_THE_ITEM.search(str(error)):
                raise ItemRejected(_valid(str(error))) from error
            raise JudgeError(f"{self.name}: the endpoint does not accept these requests: {error}") from error
        except (openai.OpenAIError, json.JSONDecodeError) as error:
            raise JudgeError(
                f"{self.name}: {type(error).__name__}: {error}. {len(self.cache)} judgements are kept; "
                "run again to continue."
            ) from error
        return _completion_text(completion), _completion_usage(completion)


def data_url(image: Image.Image, max_side: int) -> str:
    """The image as a PNG data URL, scaled down if necessary."""
    image = image.copy()
    image.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _completion_text(completion) -> str:
    """The reply's text; empty if the server's reply has none, is cut off, or is not a completion at all."""
    choices = getattr(completion, "choices", None)
    if not choices or choices[0].finish_reason == "length":
        return ""
    return _valid(getattr(choices[0].message, "content", None) or "")


def _valid(text: str) -> str:
    """`text` without lone surrogates, which no file can hold. A server can spell them in JSON escapes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _completion_usage(completion) -> dict[str, float]:
    usage = getattr(completion, "usage", None)
    names = ("prompt_tokens", "completion_tokens", "cost")  # `cost` is an extension of some endpoints
    counts = {name: getattr(usage, name, None) for name in names}
    return {name: value for name, value in counts.items() if isinstance(value, (int, float))}
