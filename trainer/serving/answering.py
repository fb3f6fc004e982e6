"""Answers a request: checks its size, builds the model's inputs, and runs `generate` under the policy."""

import base64
import re
from dataclasses import dataclass
from logging import getLogger

import torch
from jinja2 import TemplateError

from safevlm.model_policy import saved_token_ids
from safevlm.processing.pictures import PictureError, load_picture
from safevlm.safety_verdict import OFF, SafetyVerdict
from safevlm.trainer.asking import encode_chats

from .decoding import AnswerStreamer, OpenAiPenalties, Until
from .errors import RequestError
from .limits import DEFAULT_CONTEXT, MAX_ASPECT_RATIO, answer_tokens
from .request import ChatRequest, Image
from .worker import Job

GREEDY_BELOW = 0.01  # dividing logits by a smaller temperature could overflow
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII | re.IGNORECASE)

logger = getLogger(__name__)


@dataclass(frozen=True)
class Finish:
    """The last event of a job. Before it come the verdict (a `dict` in a tuple) and the texts (`str`)."""

    reason: str
    prompt_tokens: int
    completion_tokens: int


class Answering:
    """
    Answers requests with one model, one at a time.

    Args:
        model, processor: A SafeVLM.
        max_pixels (`int`): Most pixels in all images of a request together.
    """

    def __init__(self, model, processor, max_pixels: int):
        self.model, self.processor, self.max_pixels = model, processor, max_pixels
        text_config = model.config.get_text_config()
        self.vocab_size = text_config.vocab_size
        # `generate` adds one of the policy's hints to the prompt, which needs room, too.
        longest_hint = max(map(len, saved_token_ids(model.config).values()), default=0)
        self.max_tokens = getattr(text_config, "max_position_embeddings", DEFAULT_CONTEXT) - longest_hint
        self.max_characters = self.max_tokens * max(map(len, processor.tokenizer.get_vocab()))
        self.end_token_ids = frozenset(torch.as_tensor(model.generation_config.eos_token_id).flatten().tolist())

    def answer(self, request: ChatRequest, job: Job):
        """Sends the verdict as `(verdict,)`, then texts, then a `Finish`."""
        inputs = self._inputs(request, job)
        num_prompt = inputs["input_ids"].shape[1]
        arguments = self._arguments(request, room=self.max_tokens - num_prompt)
        streamer = AnswerStreamer(self.processor.tokenizer, request.stop or [], job.send)
        if not self.model.resolve_policy().enabled:  # then `generate` passes no verdict to the streamer
            job.send((SafetyVerdict.unassessed(1, self.model.config.labels, OFF).to_list()[0],))
        torch.seed() if request.seed is None else torch.manual_seed(request.seed)
        self.model.generate(
            **inputs,
            **arguments,
            tokenizer=self.processor.tokenizer,
            streamer=streamer,
            stopping_criteria=[Until(lambda: job.ended or streamer.stopped)],
        )
        streamer.flush()
        ended = streamer.stopped or (streamer.ids and streamer.ids[-1] in self.end_token_ids)
        job.send(Finish("stop" if ended else "length", num_prompt, len(streamer.ids)))

    def _inputs(self, request: ChatRequest, job: Job):
        self._check_texts(request)
        messages, images = self._decoded(request, job)
        try:
            inputs = encode_chats(self.processor, [messages], [images], self.model)
        except TemplateError as error:  # most templates insist on an order of roles
            raise RequestError(f"The model's chat template refuses the messages: {error}", "messages") from None
        except ValueError:  # processors refuse some image shapes, each with its own message
            logger.exception("The model's processor refuses a request.")
            raise RequestError("The model's processor cannot take these messages.", "messages") from None
        self._check_length(inputs["input_ids"].shape[1])
        return inputs

    def _check_texts(self, request: ChatRequest):
        """Refuses texts that are too long for the model on their own, before anything is decoded or rendered."""
        if (characters := sum(map(len, request.texts))) > self.max_characters:
            raise RequestError(
                f"The messages have {characters} characters of text, more than the model can take "
                f"({self.max_tokens} tokens).",
                "messages",
                "context_length_exceeded",
            )
        parts = [part for message in request.messages for part in message.content]
        texts = self.processor.tokenizer(request.texts, add_special_tokens=False)["input_ids"] if request.texts else []
        self._check_length(sum(map(len, texts)) - len(parts))  # joined texts can take fewer tokens than separate ones

    def _decoded(self, request: ChatRequest, job: Job) -> tuple[list[dict], list]:
        """The messages as the processor takes them, and their images, decoded."""
        messages, images, pixels_left = [], [], self.max_pixels
        for message in request.messages:
            content = []
            for part in message.content:
                if isinstance(part, Image):
                    if job.ended:
                        raise RequestError("The request took too long.", status=408)
                    image = decode_image(part.image_url.url, len(images) + 1, pixels_left)
                    pixels_left -= image.width * image.height
                    images.append(image)
                    content.append({"type": "image"})
                else:
                    content.append({"type": "text", "text": part.text})
            messages.append({"role": message.role.replace("developer", "system"), "content": content})
        return messages, images

    def _check_length(self, num_tokens: int):
        if num_tokens >= self.max_tokens:
            raise RequestError(
                f"The prompt has {num_tokens} tokens, which leaves no room for an answer: the model can take "
                f"{self.max_tokens} tokens of prompt and answer together.",
                "messages",
                "context_length_exceeded",
            )

    def _arguments(self, request: ChatRequest, room: int) -> dict:
        """Arguments of `generate` from the request's fields. Fields it leaves out follow the model's own settings."""
        requested = request.max_completion_tokens or request.max_tokens
        max_new_tokens = answer_tokens(requested, self.model.generation_config.max_new_tokens, room)
        arguments = {"max_new_tokens": max_new_tokens, "num_beams": 1, "return_dict_in_generate": True}
        if request.temperature is not None:
            arguments["do_sample"] = request.temperature >= GREEDY_BELOW
            if arguments["do_sample"]:
                arguments["temperature"] = request.temperature
        if request.top_p is not None and arguments.get("do_sample", True):
            arguments.update(do_sample=True, top_p=request.top_p)
        bias = request.logit_bias or {}
        if unknown := [token for token in bias if token >= self.vocab_size]:
            raise RequestError(
                f"logit_bias: the model has {self.vocab_size} tokens, none with the id {unknown[0]}.",
                "logit_bias",
                "invalid_value",
            )
        penalties = request.frequency_penalty or 0.0, request.presence_penalty or 0.0
        if bias or any(penalties):
            arguments["logits_processor"] = [OpenAiPenalties(*penalties, bias)]
        return arguments


def decode_image(url: str, number: int, max_pixels: int):
    """
    The picture in a data URL.

    Args:
        url (`str`): `data:image/...;base64,...`.
        number (`int`): Which image of the request it is, counted from 1; errors name it.
        max_pixels (`int`): Most pixels that it may have.

    Raises:
        `RequestError`: It is not a picture in a data URL, or too large.
    """
    start, param = DATA_URL.match(url), "messages"
    if start is None:
        raise RequestError(
            f"Image {number} must be a data URL (data:image/png;base64,...); this server fetches nothing.", param
        )
    try:
        content = base64.b64decode(url[start.end() :], validate=True)
    except ValueError as error:
        raise RequestError(f"Image {number} is not base64: {error}.", param) from None
    try:
        image = load_picture(content, max_pixels=max_pixels)
    except PictureError as error:
        raise RequestError(f"Image {number} {error.reason}.", param, "invalid_image") from None
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise RequestError(
            f"Image {number} has {image.width}x{image.height} pixels; one side may be at most {MAX_ASPECT_RATIO} "
            f"times the other.",
            param,
            "invalid_image",
        )
    return image
