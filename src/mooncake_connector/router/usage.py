"""Read what an engine counted while it answered.

Pure: no sockets, threads or clocks.
"""

from __future__ import annotations

import msgspec


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """An engine's own count; 0 is unknown.

    Attributes:
        prompt_tokens_details: how many of the prompt's tokens were not computed, where the engine says.
    """

    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: _Details | None = None

    @property
    def cached_tokens(self) -> int | None:
        """Return how many tokens of the prompt were not computed; None when the engine does not say."""
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details is not None else None


class _Answer(msgspec.Struct):
    usage: Usage | None = None


UNKNOWN = Usage()
_decoder = msgspec.json.Decoder(_Answer)


def read_usage(answer: bytes) -> Usage:
    """Return what a complete answer (JSON) says was counted; zeros when it says nothing."""
    try:
        return _decoder.decode(answer).usage or UNKNOWN
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return UNKNOWN
