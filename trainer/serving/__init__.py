"""`safevlm serve`: OpenAI's chat protocol around one SafeVLM, the verdict beside each answer and no way around it.

    POST /v1/chat/completions    GET /v1/models    GET /health

A reply is OpenAI's with the field `safety`, a row of `SafetyVerdict.to_list()` (under the policy `"off"` its action
is `"off"`). In a stream it comes with the first chunk, before any text, and again with the finish reason. A
stream ends with `data: [DONE]`, and an error within it is its last event before that. All errors have OpenAI's shape.

What a request may say stands in request.py, one typed model. It counts as hostile: images come inside it as data URLs
and nothing is fetched; sizes are checked before the work; a request ends at its time limit, and soon after its client
has left; and errors tell nothing about this machine. One thread answers, one request after the other (worker.py); a
full queue is a 503 with `Retry-After`.

Images and prompt are one step that nothing interrupts. It is bounded: by `MAX_IMAGES` and `--max-megapixels` before
images are decoded, and by the model's context before the model runs.

The way of a request: app.py (HTTP) -> request.py (fields) -> worker.py (queue) -> answering.py (prompt, `generate`) ->
decoding.py (tokens to text) -> app.py (chunks). server.py holds what uvicorn leaves open.
"""

from .answering import Answering
from .app import build_app
from .loading import load
from .server import Server

__all__ = ["Answering", "Server", "build_app", "load"]
