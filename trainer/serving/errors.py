"""Errors in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, which its clients show as they are."""

INTERNAL = "Something went wrong in the server; its log has the details."


class RequestError(Exception):
    """
    A request that gets an error instead of an answer.

    Args:
        message (`str`): What is wrong and how to fix it, addressed to the client.
        param (`str`, *optional*): The field at fault, such as `"messages.0.content"`.
        code (`str`, *optional*): A name for programs, such as `"context_length_exceeded"`.
        status (`int`): HTTP status.
        headers (`dict[str, str]`, *optional*): Additional HTTP headers of the reply.
    """

    def __init__(self, message: str, param=None, code=None, status: int = 400, headers: dict | None = None):
        super().__init__(message)
        self.param, self.code, self.status, self.headers = param, code, status, headers

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def busy(message: str) -> RequestError:
    """A 503: the same request may succeed later."""
    return RequestError(message, code="overloaded", status=503, headers={"Retry-After": "5"})


def internal() -> RequestError:
    """A 500 that reveals nothing about the machine."""
    return RequestError(INTERNAL, code="internal_error", status=500)


def client_left() -> RequestError:
    """For the log only, since nobody is left to read it; nginx uses 499 for this case."""
    return RequestError("The client left.", status=499)
