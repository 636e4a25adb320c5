"""Hold one connection to one peer: its socket, the watch on its death, its session and its open region.

Threading model: a link is used by one thread at a time. It may move between threads, with a lock in between.
"""

from __future__ import annotations

import struct
from typing import Protocol

import zmq

from mooncake_store.errors import MooncakeError
from mooncake_store.pull.base import PeerAddress
from mooncake_store.pull.session import PeerSession
from mooncake_store.pull.wire import MESSAGE_MAX_BYTES, Message, decode, encode
from mooncake_store.transport.base import Attachment, RegionDescriptor

SEND_QUEUE_MAX = 64
RECEIVE_QUEUE_MAX = 64
_POLLIN = int(zmq.POLLIN)  # arithmetic on zmq's enumerations takes 5 us
LINGER_MS = 200  # a last Release may still be on its way out when a link is closed

# Any of these means that the other end is not there now. ZeroMQ would retry for ever; we go elsewhere.
_LOST_EVENTS = (zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
                | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH)


class Attacher(Protocol):
    """What opens a peer's region; ``transport.media.Media`` is one."""

    def attach(self, region: RegionDescriptor, *, deadline_ns: int) -> Attachment:
        """Return an attachment or raise MooncakeError."""
        ...


class PeerLink:
    """One connection.

    Raises:
        zmq.ZMQError: the address cannot be used.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], peer: PeerAddress, session: PeerSession) -> None:
        self.peer = peer
        self.session = session
        self.attachment: Attachment | None = None
        self.socket = dealer_socket(context)
        self.monitor = self.socket.get_monitor_socket(_LOST_EVENTS)
        try:
            self.socket.connect(peer.control)
        except zmq.ZMQError:
            self.close()
            raise

    def send(self, message: Message) -> None:
        """Queue a message. A full queue loses it, and the missing answer ends the session in time."""
        try:
            self.socket.send(encode(message), zmq.DONTWAIT)
        except zmq.Again:
            return

    def receive(self) -> Message | None:
        """Return the next message, None when there is none now.

        Raises:
            WireError: it cannot be decoded.
        """
        if not is_readable(self.socket):
            return None
        frames = self.socket.recv_multipart(zmq.DONTWAIT)
        return decode(frames[0] if len(frames) == 1 else b"")

    def lost_reason(self) -> str:
        """Return why the connection is known to be broken; empty while it is not."""
        if not is_readable(self.monitor):
            return ""
        frames = self.monitor.recv_multipart(zmq.DONTWAIT)
        (event,) = struct.unpack_from("=H", frames[0])
        return "the connection was refused" if event == zmq.EVENT_CONNECT_RETRIED else "the connection broke"

    def attach(self, media: Attacher, region: RegionDescriptor, *, deadline_ns: int) -> str:
        """Open the peer's region; return why not, empty when it is open."""
        try:
            self.attachment = media.attach(region, deadline_ns=deadline_ns)
        except MooncakeError as error:
            return f"cannot attach: {error.message}"
        return ""

    def close(self) -> None:
        """Close the sockets and the region. Idempotent."""
        attachment, self.attachment = self.attachment, None
        if attachment is not None:
            attachment.close()
        if not self.socket.closed:
            self.socket.disable_monitor()
            self.monitor.close(linger=0)
            self.socket.close(linger=LINGER_MS)


def is_readable(socket: zmq.Socket[bytes]) -> bool:
    """Tell whether a message waits. Asked before receiving: an exception for each last one costs 20 us."""
    return bool(int(socket.get(zmq.EVENTS)) & _POLLIN)


def dealer_socket(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """Return an unconnected, bounded DEALER socket."""
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.LINGER, LINGER_MS)
    socket.set(zmq.SNDHWM, SEND_QUEUE_MAX)
    socket.set(zmq.RCVHWM, RECEIVE_QUEUE_MAX)
    socket.set(zmq.MAXMSGSIZE, MESSAGE_MAX_BYTES)
    socket.set(zmq.IPV6, 1)
    return socket
