"""Every limit of the server: how much a request may send, ask for and take, and how long an answer may be.

Those in [`ServerLimits`] are options of `safevlm serve`; the rest are fixed. This file imports nothing heavy, so that
`safevlm serve --help` can show the defaults.
"""

import math
from dataclasses import dataclass, fields

from safevlm.trainer.options import option


@dataclass(frozen=True)
class ServerLimits:
    """
    The limits that the operator can set. They are flags of `safevlm serve`, whose help texts explain them.

    Raises:
        `ValueError`: One of them is not a number above 0.
    """

    max_request_mb: float = option("largest request in megabytes, images included", 20.0)
    max_megapixels: float = option("most pixels in all images of a request together, in millions", 25.0)
    request_timeout: float = option(
        "time limit of a request, including its wait in the queue; a longer answer is cut off",
        120.0,
        metavar="SECONDS",
    )
    max_waiting: int = option("requests that can wait in the queue; further ones get a 503", 16)

    def __post_init__(self):
        for field in fields(self):
            if not 0 < (value := getattr(self, field.name)) < math.inf:
                raise ValueError(f"--{field.name.replace('_', '-')} must be a number above 0, got {value}.")

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_request_mb * 1_000_000)

    @property
    def max_pixels(self) -> int:
        return int(self.max_megapixels * 1_000_000)


# Answers
DEFAULT_ANSWER_TOKENS = 1024  # if the request names no limit and the model's generation_config none above this


def answer_tokens(requested: int | None, model_default: int | None, room: int) -> int:
    """
    The cap on an answer's tokens.

    Args:
        requested (`int`, *optional*): `max_completion_tokens` or `max_tokens` of the request.
        model_default (`int`, *optional*): `max_new_tokens` of the model's `generation_config`.
        room (`int`): Tokens that the prompt leaves free in the model's context.
    """
    return min(requested or max(model_default or 0, DEFAULT_ANSWER_TOKENS), room)


# Messages
MAX_MESSAGES = 256
MAX_PARTS = 256  # per message
MAX_CHARACTERS = 1_000_000  # in all texts together
DEFAULT_CONTEXT = 32_768  # tokens of prompt and answer, for models that do not state their `max_position_embeddings`

# Images
MAX_IMAGES = 64  # image processors enlarge small images: many single pixels would grow to gigabytes
MAX_ASPECT_RATIO = 200  # image processors enlarge the shorter side: a very thin strip would grow to gigabytes

# JSON
MAX_COMMAS = 100_000  # between values; bounds the time that parsing takes
MAX_VALUES = 10_000  # each can be wrong, and pydantic collects all errors before it reports the first
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 256
MAX_BIASES = 1024
MAX_NAME_CHARACTERS = 512

# Connections
MAX_CONNECTIONS = 256
HEADER_SECONDS = 10  # for the request line and all headers
BODY_SECONDS = 60
REPLY_SECONDS = 30  # to take the reply, on top of the time for body and answer
SHUTDOWN_SECONDS = 5
