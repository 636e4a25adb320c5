"""Ask one question of a peer's control socket and wait for the answer.

Threading model: every call makes its own socket; any thread.
"""

from __future__ import annotations

import time
from typing import TypeVar

import zmq

from mooncake_store.errors import PeerUnreachable, RemoteProtocolError
from mooncake_store.pull.link import dealer_socket
from mooncake_store.pull.wire import Denied, Message, StatusReply, StatusRequest, decode, encode

Answer = TypeVar("Answer", bound=Message)


def query_status(address: str, timeout_s: float) -> StatusReply:
    """Return the metrics and facts of the member at ``address``, e.g. ``tcp://127.0.0.1:40123``.

    Raises:
        PeerUnreachable: no answer in time, or an address that cannot be used.
        RemoteProtocolError: an answer that is none.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        return ask(context, address, StatusRequest(1), StatusReply, timeout_s=timeout_s)
    finally:
        context.destroy(linger=0)


def ask(context: zmq.Context[zmq.Socket[bytes]], address: str, question: Message, expected: type[Answer], *,
        timeout_s: float) -> Answer:
    """Send ``question`` and return the answer of type ``expected``.

    Raises:
        PeerUnreachable: no answer in time, or an address that cannot be used.
        RemoteProtocolError: the peer denied, or answered something else; a WireError when it cannot be decoded.
    """
    deadline = time.monotonic() + timeout_s
    socket = dealer_socket(context)
    try:
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            raise PeerUnreachable(f"cannot connect: {error}", where=address,
                                  hint="use an address such as tcp://127.0.0.1:40123") from error
        socket.send(encode(question))
        remaining_ms = max(0, int((deadline - time.monotonic()) * 1000))
        if not socket.poll(remaining_ms):
            raise PeerUnreachable(f"no answer within {timeout_s:g} s", where=address, hint="is the process running?")
        frames = socket.recv_multipart()
        answer = decode(frames[0] if len(frames) == 1 else b"")
    finally:
        socket.close(linger=0)
    if isinstance(answer, Denied):
        raise RemoteProtocolError(f"denied: {answer.reason} {answer.detail}".strip(), where=address)
    if not isinstance(answer, expected):
        raise RemoteProtocolError(f"answered with {type(answer).__name__}, not {expected.__name__}", where=address)
    return answer
