"""Raw HTTP requests to a server under test, without a client library."""

import http.client
import json
from types import SimpleNamespace

GENERATED = {"temperature": 0, "max_tokens": 12}


def post(server, path="/v1/chat/completions", body=b"", method="POST", kind="application/json") -> tuple[int, str]:
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=120)
    connection.request(method, path, body, {"Content-Type": kind})
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, text


def error_of(text: str) -> SimpleNamespace:
    """The fields of an error, which must have OpenAI's form."""

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    reply = json.loads(text, parse_constant=no_constant)
    assert set(reply) == {"error"} and set(reply["error"]) == {"message", "type", "param", "code"}
    assert isinstance(reply["error"]["message"], str) and isinstance(reply["error"]["type"], str)
    return SimpleNamespace(**reply["error"])
