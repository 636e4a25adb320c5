"""Accept connections of peers and say which of them has something to do.

Threading model: one thread; ``wake`` may be called from any other. What a peer begins must end in time: half a message,
or an answer that it does not take, is kept for ``STEP_MAX_S``.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import time

from mooncake_store.errors import PeerUnreachable
from mooncake_store.pull.channel import Channel, join_address

logger = logging.getLogger(__name__)

PEERS_MAX = 4096
BACKLOG = 256
STEP_MAX_S = 30.0
IDLE_MAX_S = 600.0
"""A connection nobody used for this long is closed; readers close theirs after a minute (peers.py)."""
SWEEP_S = 1.0
"""How often lateness is looked for."""


class Peer:
    """One connection.

    Attributes:
        number: never used again.
        is_greeted: whether the peer has introduced itself.
        is_heard: whether what it sends is taken in; not while it leaves answers lying, or has sent much.
        due_s: when what it has begun must be over.
    """

    __slots__ = ("channel", "due_s", "is_greeted", "is_heard", "number")

    def __init__(self, number: int, channel: Channel, due_s: float) -> None:
        self.number = number
        self.channel = channel
        self.is_greeted = False
        self.is_heard = True
        self.due_s = due_s


class Listener:
    """The socket that peers connect to, and their connections.

    Args:
        host: address to bind; the port is chosen by the system.

    Attributes:
        address: where peers connect to, as a number, so that no reader waits for a name server.

    Raises:
        PeerUnreachable: the address cannot be bound.
    """

    def __init__(self, host: str) -> None:
        try:
            family, _, _, _, target = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
            self._socket = socket.create_server(target, family=family, backlog=BACKLOG)
        except OSError as error:
            raise PeerUnreachable(f"cannot bind {host}: {error}", where="$.host",
                                  hint="use an address of this machine") from error
        self._socket.setblocking(False)
        self.address = join_address(*self._socket.getsockname()[:2])
        self._peers: dict[int, Peer] = {}
        self._num_accepted = 0
        self._sweep_s = 0.0
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._socket, select.EPOLLIN)
        self._epoll.register(self._wake_fd, select.EPOLLIN)

    def wait(self, timeout_s: float) -> list[Peer]:
        """Wait until peers have something to do, and return those; call ``settle`` or ``drop`` for each."""
        ready: list[Peer] = []
        for fd, _ in self._epoll.poll(timeout_s):
            peer = self._peers.get(fd)
            if peer is not None:
                ready.append(peer)
            elif fd == self._socket.fileno():
                self._accept()
        now_s = time.monotonic()
        if now_s >= self._sweep_s:
            self._sweep_s = now_s + SWEEP_S
            for peer in [late for late in self._peers.values() if late.due_s < now_s and late not in ready]:
                self.drop(peer, "it took too long")
        return ready

    def settle(self, peer: Peer, *, num_served: int, has_more: bool) -> None:
        """Say that a peer has been served for now.

        Args:
            peer: who.
            num_served: how many of its messages; with none, what it has begun is not any nearer to its end.
            has_more: it may have sent more, which was not looked at.
        """
        channel, now_s = peer.channel, time.monotonic()
        is_heard = not (has_more or channel.unsent)
        if is_heard != peer.is_heard:
            peer.is_heard = is_heard
            # What waits for its turn does so as a writable connection: turns are shared fairly.
            self._epoll.modify(channel.fd, select.EPOLLIN if is_heard else select.EPOLLOUT)
        if not channel.is_midway:
            peer.due_s = now_s + IDLE_MAX_S
        elif num_served or peer.due_s > now_s + STEP_MAX_S:
            peer.due_s = now_s + STEP_MAX_S

    def drop(self, peer: Peer, why: str) -> None:
        """Close a peer's connection."""
        logger.debug("dropping a peer: %s", why)
        del self._peers[peer.channel.fd]
        self._epoll.unregister(peer.channel.fd)
        peer.channel.close()

    def wake(self) -> None:
        """Make ``wait`` return now."""
        os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Close every connection."""
        for peer in list(self._peers.values()):
            self.drop(peer, "closing")
        self._socket.close()
        self._epoll.close()
        os.close(self._wake_fd)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
            channel = Channel(connection)
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            logger.warning("cannot accept a peer: %s", error)
            time.sleep(0.05)  # out of descriptors: the listener stays readable, so do not spin on it
            return
        if len(self._peers) >= PEERS_MAX:
            logger.warning("turning a peer away: there are %d already", PEERS_MAX)
            channel.close()
            return
        self._num_accepted += 1
        self._peers[channel.fd] = Peer(self._num_accepted, channel, time.monotonic() + STEP_MAX_S)
        self._epoll.register(channel.fd, select.EPOLLIN)
