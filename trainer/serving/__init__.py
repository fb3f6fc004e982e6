"""`safevlm serve`: OpenAI's chat protocol for one SafeVLM. Every reply carries the verdict; no request can bypass it.

    POST /v1/chat/completions    GET /v1/models    GET /health

Replies are OpenAI's plus the field `safety`, a row of `SafetyVerdict.to_list()` (under the policy `"off"` its action
is `"off"`). A stream carries it in its first chunk, before any text, and again in the chunk that finishes. A stream
ends with `data: [DONE]`; an error in mid-stream is the last event before that. All errors have OpenAI's shape.

`run.py` loads the model and starts the server. The path of a request:

    routes.py      HTTP: reads the body, stops when the client leaves
    request.py     checks every field, in one typed model
    worker.py      the queue: one thread answers, one request at a time; a full queue is a 503 with `Retry-After`
    answering.py   the model's inputs, and `generate` under the policy
    decoding.py    tokens to text, penalties, stop texts
    replies.py     replies and chunks in OpenAI's shape

`limits.py` has every limit, including the cap on an answer's tokens; `server.py` closes stalled connections.

Requests are treated as hostile: images arrive inside the request as data URLs and nothing is fetched; sizes are
checked before any work is done; a request ends at its time limit, and soon after its client leaves; errors reveal
nothing about this machine. Only the preparation of images and prompt cannot be interrupted. It is bounded by
`MAX_IMAGES` and `--max-megapixels` before images are decoded, and by the model's context before the model runs.
"""
