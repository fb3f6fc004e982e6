"""`safevlm serve`: transformers' server for one SafeVLM, with the verdict beside each answer and no way around it.

Loading, the generation thread and OpenAI's protocol are transformers'. Here a reply gets the field `safety`; endpoints
and fields of a request that reach past the policy are not there; and a request counts as hostile: images come inside
it, nothing is fetched, sizes are checked before the work, and errors tell nothing about this machine.
"""

import asyncio
import base64
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from logging import getLogger
from types import SimpleNamespace
from typing import Annotated, Literal
from uuid import uuid4

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming
from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError
from starlette.exceptions import HTTPException as AnyHTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState, _GenerationCancelled
from transformers.utils import logging

from .data.errors import ImageError
from .data.images import MAX_PIXELS, load_image

MAX_MESSAGES = 256  # finding the assistant's turns takes time with their square
MAX_CHARACTERS = 1_000_000
INTERNAL_ERROR = "internal error"
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII | re.IGNORECASE)

logger = getLogger(__name__)


class Text(BaseModel):
    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    url: str


class Image(BaseModel):
    type: Literal["image_url"]
    image_url: ImageUrl


def _parts(content):
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: Annotated[list[Annotated[Text | Image, Field(discriminator="type")]], BeforeValidator(_parts)]


MESSAGES = TypeAdapter(Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)])


class RequestFields:
    """Which fields `BaseHandler` lets pass: OpenAI's. Not those that transformers adds, which reach processor and
    generation unchecked (another chat template hides the question from the head), nor tools, whose texts could spell
    control tokens."""

    __mutable_keys__ = CompletionCreateParamsStreaming.__mutable_keys__ - {"tools"}


class Chat(ChatCompletionHandler):
    """Answers one request. It holds that request's verdict, so that no other can get it and nothing is left behind."""

    _valid_params_class = RequestFields

    def __init__(self, manager: ModelManager, generation: GenerationState, preparation: ThreadPoolExecutor):
        super().__init__(manager, generation)
        self.preparation, self.safety, self.sent = preparation, None, None

    async def handle_request(self, body: dict, request_id: str):
        self._validate_request(body)
        model_id, model, processor = self._resolve_model(body)
        prepared = asyncio.get_running_loop().run_in_executor(self.preparation, self._prepare, body, model, processor)
        inputs, config = await prepared
        generation = self.generation_state.get_manager(model_id)
        call = request_id, self._noting(model), processor, model_id, inputs, config, generation
        return self._streaming(*call) if body.get("stream") else await self._non_streaming(*call)

    def _prepare(self, body: dict, model, processor):
        """The model's inputs and the generation config of a request."""
        messages = read_messages(body.get("messages"))
        try:
            inputs = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        except TemplateError as error:  # templates insist on an order of roles
            raise HTTPException(400, f"The model's chat template refuses the messages: {error}") from None
        length = inputs["input_ids"].shape[1]
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", length)
        if length > longest:
            raise HTTPException(400, f"The prompt has {length} tokens, the model takes {longest}.")
        try:
            config = self._build_generation_config(body, model.generation_config)
            config.validate()
            if config.sequence_bias is not None:  # OpenAI's `logit_bias` has integers, which transformers refuses
                config.sequence_bias = {tokens: float(bias) for tokens, bias in config.sequence_bias.items()}
        except Exception as error:  # whatever it trips over is a value in the request
            raise HTTPException(400, f"A field of the request cannot be used: {error}") from None
        config.return_dict_in_generate = True
        return inputs.to(model.device, model.dtype), config

    def _noting(self, model) -> SimpleNamespace:
        """`model` for the generation thread: its `generate` notes the verdict, and its errors tell nothing."""

        def generate(streamer=None, **kwargs):
            if streamer is not None:
                streamer.put_safety = self._note
            kwargs["tokenizer"] = kwargs["tokenizer"].tokenizer  # `stop` needs more of it than a processor has
            try:
                output = model.generate(streamer=streamer, **kwargs)
            except Exception as error:
                if streamer is None or isinstance(error, _GenerationCancelled):
                    raise
                logger.exception("A streamed request failed.")
                raise RuntimeError(INTERNAL_ERROR) from None  # its text becomes the stream's end
            self._note(output["safety"])
            return output.sequences

        return SimpleNamespace(config=model.config, generate=generate)

    def _note(self, assessment):
        self.safety = None if assessment is None else assessment.to_list()[0]

    def _build_completion(self, *args, **kwargs) -> dict:
        return {**super()._build_completion(*args, **kwargs), "safety": self.safety}

    def chunk_to_sse(self, chunk) -> str:
        # In the first chunk after it is known, which has the first word, and in the last one.
        if self.safety != self.sent or chunk.choices[0].finish_reason:
            chunk.safety = self.sent = self.safety
        return super().chunk_to_sse(chunk)


def read_messages(messages) -> list[dict]:
    """
    OpenAI's chat messages as the processor takes them, images decoded.

    Raises:
        `HTTPException`: They are not of that form, too large, or hold an image that cannot be used.
    """
    try:
        messages = [message.model_dump() for message in MESSAGES.validate_python(messages)]
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, ("messages", *first["loc"])))
        raise HTTPException(400, f"{where}: {first['msg']}") from None
    parts = [part for message in messages for part in message["content"]]
    if sum(len(part.get("text", "")) for part in parts) > MAX_CHARACTERS:
        raise HTTPException(400, f"The messages have more than {MAX_CHARACTERS} characters of text.")
    pixels = MAX_PIXELS  # of all images together: some hundred kilobytes can hold as many as an image may have
    for number, part in enumerate((part for part in parts if part["type"] == "image_url"), 1):
        image = _decode(part.pop("image_url")["url"], number, pixels)
        pixels -= image.width * image.height
        part.update(type="image", image=image)
    return messages


def _decode(url: str, number: int, max_pixels: int):
    start = DATA_URL.match(url)
    if start is None:
        raise HTTPException(
            400, f"Image {number} must be a data URL (data:image/png;base64,...); this server fetches nothing."
        )
    try:
        return load_image(base64.b64decode(url[start.end() :], validate=True), max_pixels=max_pixels)
    except ImageError as error:
        raise HTTPException(400, f"Image {number} {error.reason}.") from None
    except ValueError as error:
        raise HTTPException(400, f"Image {number} is not base64: {error}.") from None


def load(name: str, policy=None, **options) -> ModelManager:
    """
    Loads a SafeVLM into transformers' manager, which serves no other.

    Args:
        policy (preset name or file, *optional*): Made the model's own, with the model's calibration.
        options: Of `ModelManager`: `device`, `dtype`, `quantization`.
    """
    logging.disable_progress_bar()
    manager = ModelManager(force_model=name, **options)
    (loaded,) = manager.loaded_models.values()
    loaded.model.check_policy_texts(loaded.processor)
    if policy is not None:
        loaded.model.set_safety_policy(loaded.model.resolve_policy(policy), loaded.processor)
    return manager


def build_app(manager: ModelManager, max_request_mb: float) -> FastAPI:
    """The routes; everything else is a 404."""
    app, generation, started = FastAPI(openapi_url=None), GenerationState(), int(time.time())
    preparation = ThreadPoolExecutor(max_workers=1)  # one request's images in memory at a time; the event loop is free

    @app.exception_handler(AnyHTTPException)
    async def refused(request, error):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request, error):
        return JSONResponse({"error": INTERNAL_ERROR}, 500)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        body = await _read_body(request, int(max_request_mb * 1_000_000))
        return await Chat(manager, generation, preparation).handle_request(body, f"chatcmpl-{uuid4().hex}")

    @app.get("/v1/models")
    async def models():
        model = {"id": manager.force_model, "object": "model", "created": started, "owned_by": "safevlm"}
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    return app


async def _read_body(request: Request, max_bytes: int) -> dict:
    data, size = bytearray(), 0
    async for chunk in request.stream():  # to its end: who is cut off while sending does not read why
        size += len(chunk)
        if size <= max_bytes:
            data += chunk
    if size > max_bytes:
        raise HTTPException(413, f"The request has {size} bytes, more than {max_bytes}.")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise HTTPException(400, "The request's body is not a JSON object.")
    return body


class Server(uvicorn.Server):
    """Says where it listens once it does."""

    def __init__(self, config: uvicorn.Config, greeting: str):
        super().__init__(config)
        self.greeting = greeting

    async def startup(self, sockets=None):
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        sys.stdout.write(f"{self.greeting} at http://{f'[{host}]' if ':' in host else host}:{port}/v1\n")
        sys.stdout.flush()
