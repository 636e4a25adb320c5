"""Hold one end of a connection on which messages travel; never wait for the other end.

Threading model: a channel is used by one thread at a time. It may move between threads, with a lock in between.
"""

from __future__ import annotations

import errno
import select
import socket

from mooncake_store.errors import PeerUnreachable
from mooncake_store.pull.wire import MESSAGE_MAX_BYTES, Inbox, Message, frame
from mooncake_store.transport.tcp_stream import quicken

SCHEME = "tcp://"
RECEIVE_BYTES = 32 << 10
UNSENT_MAX_BYTES = 2 * MESSAGE_MAX_BYTES


class Channel:
    """One end of a connection, which it owns from now on.

    Attributes:
        fd: to wait for ``events`` on.
        unsent: what waits to be sent.
        take: takes the next message that has been received, as ``Inbox.take``.
    """

    def __init__(self, connection: socket.socket) -> None:
        quicken(connection)
        self.fd = connection.fileno()
        self._socket = connection
        self._inbox = Inbox()
        self.take = self._inbox.take
        self.unsent = b""

    @classmethod
    def connect(cls, address: str) -> Channel:
        """Begin to connect to ``address``, e.g. ``tcp://127.0.0.1:40123``; whoever receives learns how that ended.

        Raises:
            PeerUnreachable: the address cannot be used.
        """
        try:
            host, port = split_address(address)
            family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            channel = cls(socket.socket(family, kind, protocol))
            error = channel._socket.connect_ex(target)
            if error not in (0, errno.EINPROGRESS):
                channel.close()
                raise OSError(error, errno.errorcode.get(error, "unknown"))
        except (OSError, ValueError) as error:
            raise PeerUnreachable(f"cannot connect: {error}", where=address,
                                  hint="use an address such as tcp://127.0.0.1:40123") from error
        return channel

    @property
    def events(self) -> int:
        """What to wait for, as poll and epoll call it."""
        return select.POLLIN | select.POLLOUT if self.unsent else select.POLLIN

    @property
    def is_midway(self) -> bool:
        """Tell whether something waits to be sent, or has come in and is not a whole message yet."""
        return bool(self.unsent) or len(self._inbox) > 0

    def send(self, message: Message) -> None:
        """Send a message as far as the connection takes it now; the rest waits for ``flush``.

        Raises:
            OSError: the connection is broken, or the other end takes nothing.
            LocalProtocolError: the message is too large.
        """
        data = frame(message)
        if len(self.unsent) > UNSENT_MAX_BYTES:
            raise OSError("the other end does not take what it is sent")
        if self.unsent:
            self.unsent += data
        else:
            self.unsent = data
            self.flush()

    def flush(self) -> None:
        """Send what the connection takes now. Raises OSError when it is broken."""
        try:
            self.unsent = self.unsent[self._socket.send(self.unsent):]
        except BlockingIOError:
            pass  # poll says when

    def receive(self) -> None:
        """Take in some of what has arrived. Raises OSError when the connection is broken or over."""
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionResetError("the other end hung up")
        self._inbox.feed(data)

    def wait(self, timeout_s: float) -> bool:
        """Wait until there is something to send or to receive, and do it; False on timeout. Raises OSError."""
        poller = select.poll()
        poller.register(self.fd, self.events)
        if not poller.poll(max(0.0, timeout_s * 1000)):
            return False
        if self.unsent:
            self.flush()
        self.receive()
        return True

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._socket.close()


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``tcp://host:port``. Raises ValueError."""
    host, _, port = address.removeprefix(SCHEME).rpartition(":")
    if not address.startswith(SCHEME) or not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ValueError(f"{address!r} is no address")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    """Return ``tcp://host:port``."""
    return f"{SCHEME}[{host}]:{port}" if ":" in host else f"{SCHEME}{host}:{port}"
