"""Say what went wrong the way OpenAI's API says it, as JSON and inside an event stream.

Pure: no sockets, threads or clocks.
"""

from __future__ import annotations

import msgspec

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}
DONE = b"data: [DONE]\n\n"
MESSAGE_MAX_CHARS = 2000


class Problem(msgspec.Struct, frozen=True):
    """Why a request gets no answer.

    Attributes:
        status: HTTP status.
        message: for people; says what, where and what to do.
        param: the request's field it is about, if any.
        retry_after_s: 0 when trying again does not help.
    """

    status: int
    message: str
    param: str | None = None
    retry_after_s: int = 0


class _Error(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: int


class _ErrorAnswer(msgspec.Struct):
    error: _Error


_encoder = msgspec.json.Encoder()


def problem_json(problem: Problem) -> bytes:
    """Return the JSON body of an error."""
    kind = TYPES.get(problem.status, "InternalServerError")
    error = _Error(problem.message[:MESSAGE_MAX_CHARS], kind, problem.param, problem.status)
    return _encoder.encode(_ErrorAnswer(error))


def problem_event(problem: Problem, *, tail: bytes) -> bytes:
    """Return the events that end a broken stream: the error, then DONE, as engines themselves do.

    Args:
        problem: what happened.
        tail: the last bytes that were relayed; an event that was cut is closed first.
    """
    start = b"" if tail.endswith(b"\n\n") or not tail else b"\n\n"
    return start + b"data: " + problem_json(problem) + b"\n\n" + DONE


def is_finished_stream(tail: bytes) -> bool:
    """Tell whether a stream ended with DONE rather than in the middle."""
    return tail.rstrip().endswith(b"data: [DONE]")


def is_json(data: bytes) -> bool:
    """Tell whether these bytes are valid JSON, e.g. an engine's error that can be relayed as it is."""
    try:
        msgspec.json.decode(data, type=msgspec.Raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return bool(data)
