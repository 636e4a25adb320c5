"""Ask one question of a peer's control socket and wait for the answer.

Threading model: every call makes its own connection; any thread.
"""

from __future__ import annotations

import time
from typing import TypeVar

from mooncake_store.errors import PeerUnreachable, RemoteProtocolError
from mooncake_store.pull.channel import Channel
from mooncake_store.pull.wire import Denied, Message, StatusReply, StatusRequest

Answer = TypeVar("Answer", bound=Message)


def query_status(address: str, timeout_s: float) -> StatusReply:
    """Return the metrics and facts of the member at ``address``, e.g. ``tcp://127.0.0.1:40123``.

    Raises:
        PeerUnreachable: no answer in time, or an address that cannot be used.
        RemoteProtocolError: an answer that is none.
    """
    return ask(address, StatusRequest(1), StatusReply, timeout_s=timeout_s)


def ask(address: str, question: Message, expected: type[Answer], *, timeout_s: float) -> Answer:
    """Send ``question`` and return the answer of type ``expected``.

    Raises:
        PeerUnreachable: no answer in time, or an address that cannot be used.
        RemoteProtocolError: the peer denied, or answered something else; a WireError when it cannot be decoded.
    """
    answer = _exchange(address, question, time.monotonic() + timeout_s)
    if answer is None:
        raise PeerUnreachable(f"no answer within {timeout_s:g} s", where=address, hint="is the process running?")
    if isinstance(answer, Denied):
        raise RemoteProtocolError(f"denied: {answer.reason} {answer.detail}".strip(), where=address)
    if not isinstance(answer, expected):
        raise RemoteProtocolError(f"answered with {type(answer).__name__}, not {expected.__name__}", where=address)
    return answer


def _exchange(address: str, question: Message, deadline_s: float) -> Message | None:
    channel = Channel.connect(address)
    try:
        channel.send(question)
        while (answer := channel.take()) is None:
            if not channel.wait(deadline_s - time.monotonic()):
                return None
    except OSError as error:
        raise PeerUnreachable(f"cannot connect: {error}", where=address, hint="is the process running?") from error
    finally:
        channel.close()
    return answer
