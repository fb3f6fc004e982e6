"""A chat request of OpenAI's protocol: its fields and their ranges.

Every field works, is harmless without effect (`user`, `metadata`), or is refused by name. Unknown fields are refused
as well: some that other servers accept could bypass the policy, such as a chat template in the request.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError, from_json

from .errors import RequestError
from .limits import (
    MAX_BIASES,
    MAX_CHARACTERS,
    MAX_COMMAS,
    MAX_IMAGES,
    MAX_MESSAGES,
    MAX_NAME_CHARACTERS,
    MAX_PARTS,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_VALUES,
)

ROLES, PARTS = ("system", "developer", "user", "assistant"), ("text", "image_url")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Text(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # no effect: each model family has its own image sizes


class Image(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


def _as_list(kind: str):
    """Accepts a single string in place of a list."""

    def convert(value):
        if isinstance(value, list):
            return value
        if not isinstance(value, str):
            raise PydanticCustomError("type", "must be a string or a list")
        return [{"type": "text", "text": value}] if kind == "part" else [value]

    return BeforeValidator(convert)


def only(*allowed) -> Any:
    """The type of a known field that only these values (or none) are supported for."""

    def check(value):
        if value is None or any(type(value) is type(option) and value == option for option in allowed):
            return value
        # pydantic treats the message as a template, so the values are passed separately.
        usable = f" or use {' or '.join(map(repr, allowed))}" if allowed else ""
        raise PydanticCustomError(
            "unsupported", "this server does not support it; leave it out{usable}", {"usable": usable}
        )

    return Annotated[Any, AfterValidator(check)]


Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_PARTS), _as_list("part")]
TextsAndImages = Annotated[
    list[Annotated[Text | Image, Field(discriminator="type")]],
    Field(min_length=1, max_length=MAX_PARTS),
    _as_list("part"),
]
Name = Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)]


class Instruction(Strict):
    role: Literal["system", "developer"]
    content: Texts
    name: Name | None = None


class Question(Strict):
    role: Literal["user"]
    content: TextsAndImages
    name: Name | None = None


class Answer(Strict):
    """An earlier answer. Clients send back what they received, including the empty fields of OpenAI's messages."""

    role: Literal["assistant"]
    content: Texts
    name: Name | None = None
    refusal: only() = None
    audio: only() = None
    annotations: only([]) = None
    function_call: only() = None
    tool_calls: only([]) = None


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: only(False) = None


Message = Annotated[Instruction | Question | Answer, Field(discriminator="role")]
Count = Annotated[int, Field(ge=1, le=2**53)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class ChatRequest(Strict):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # How the answer is written. `limits.answer_tokens` caps its length.
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[int, Field(ge=0, lt=2**31)], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_BIASES),
        ]
        | None
    ) = None
    stop: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
            Field(max_length=MAX_STOPS),
            _as_list("text"),
        ]
        | None
    ) = None

    # Accepted without effect.
    user: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    metadata: Annotated[dict[Name, Name], Field(max_length=16)] | None = None

    # Known, but only accepted with the value that means "off".
    n: only(1) = None
    logprobs: only(False) = None
    top_logprobs: only(0) = None
    response_format: only({"type": "text"}) = None
    tools: only([]) = None
    tool_choice: only("none", "auto") = None
    parallel_tool_calls: only(True, False) = None
    functions: only([]) = None
    function_call: only("none", "auto") = None
    modalities: only(["text"]) = None
    audio: only() = None
    prediction: only() = None
    reasoning_effort: only("none") = None
    verbosity: only("medium") = None
    service_tier: only("auto", "default") = None
    store: only(False) = None
    web_search_options: only() = None

    @property
    def texts(self) -> list[str]:
        return [part.text for message in self.messages for part in message.content if isinstance(part, Text)]

    @property
    def images(self) -> list[ImageUrl]:
        parts = (part for message in self.messages for part in message.content)
        return [part.image_url for part in parts if isinstance(part, Image)]


def read_request(data: bytes | bytearray) -> ChatRequest:
    """
    The chat request in the body of an HTTP request.

    Raises:
        `RequestError`: The body is not JSON, or not a valid request. Names the field at fault.
    """
    if data.count(b",") > MAX_COMMAS:
        raise RequestError(f"The request has more than {MAX_COMMAS} commas, which means too many values.")
    _check_number_of_values(data := bytes(data))
    try:
        request = ChatRequest.model_validate_json(data)
    except ValidationError as error:
        raise _explain(error) from None
    if len(request.images) > MAX_IMAGES:
        raise RequestError(f"The request has {len(request.images)} images, more than {MAX_IMAGES}.", "messages")
    characters = sum(map(len, request.texts))
    if characters > MAX_CHARACTERS:
        raise RequestError(
            f"The messages have {characters} characters of text, more than {MAX_CHARACTERS}.",
            "messages",
            "string_above_max_length",
        )
    return request


def _check_number_of_values(data: bytes):
    try:
        count, pending = 0, [from_json(data)]
    except ValueError as error:
        raise RequestError(f"The request's body is not a JSON object: {error}.") from None
    while pending:
        value = pending.pop()
        if isinstance(value, dict | list):
            count += len(value)
            if count > MAX_VALUES:
                raise RequestError(f"The request has more than {MAX_VALUES} values.")
            pending.extend(value.values() if isinstance(value, dict) else value)


def _explain(error: ValidationError) -> RequestError:
    """An error that names the field at fault. Only the first: every single value may have one."""
    first = error.errors(include_url=False, include_input=False)[0]
    if not first["loc"]:
        return RequestError(f"The request's body is not a JSON object: {first['msg']}.")
    path = [
        str(step)
        for i, step in enumerate(first["loc"])
        # pydantic's path also names the chosen member of a union, which is not a field.
        if not (i and isinstance(first["loc"][i - 1], int) and step in (*ROLES, *PARTS)) and step != "[key]"
    ]
    if first["type"].startswith("union_tag"):
        path.append(first["ctx"]["discriminator"].strip("'"))
    param = ".".join(path)[:200]
    if first["type"] == "extra_forbidden":
        message, code = "this server does not know this field; leave it out", "unknown_parameter"
    elif first["type"] == "unsupported":
        message, code = first["msg"], "unsupported_parameter"
    elif first["type"] == "missing":
        message, code = "is required", "missing_required_parameter"
    else:
        message, code = first["msg"], "invalid_value"
    return RequestError(f"{param}: {message}.", param, code)
