"""Errors in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, which its clients show as they are."""

INTERNAL = "Something went wrong in the server; its log says what."


class RequestError(Exception):
    """
    A request that gets no answer.

    Args:
        message (`str`): What is wrong and how to mend it, for whoever sent the request.
        param (`str`, *optional*): The field it is about, such as `"messages.0.content"`.
        code (`str`, *optional*): For programs, such as `"context_length_exceeded"`.
        status (`int`): Of HTTP.
        headers (`dict[str, str]`, *optional*): Further ones of the reply.
    """

    def __init__(self, message: str, param=None, code=None, status: int = 400, headers: dict | None = None):
        super().__init__(message)
        self.param, self.code, self.status, self.headers = param, code, status, headers

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def busy(message: str) -> RequestError:
    """A 503: the same request may be answered in a while."""
    return RequestError(message, code="overloaded", status=503, headers={"Retry-After": "5"})


def internal() -> RequestError:
    return RequestError(INTERNAL, code="internal_error", status=500)


def client_left() -> RequestError:
    """Nobody reads it; 499 is nginx's."""
    return RequestError("The client left.", status=499)
