"""Hold the tcp connection that a reader and an owner set up their queue pairs over: the reader's side."""

from __future__ import annotations

import socket
import time

from mooncake_store.errors import PeerUnreachable, RemoteProtocolError, TransferFailed
from mooncake_store.transport.base import RegionGone
from mooncake_store.transport.rdma import wire

CONNECT_TIMEOUT_S = 3.0


class Link:
    """The reader's side of one connection. Its end means that the owner dropped our queue pairs, or died.

    Raises:
        PeerUnreachable: nobody answers.
    """

    def __init__(self, host: str, port: int, *, deadline_ns: int) -> None:
        self.where = f"rdma {host}:{port}"
        try:
            self._socket = socket.create_connection((host, port), timeout=min(CONNECT_TIMEOUT_S, _left_s(deadline_ns)))
        except ConnectionRefusedError as error:
            raise PeerUnreachable("nobody listens: the owner is gone", where=self.where) from error
        except OSError as error:
            raise PeerUnreachable(f"cannot connect: {error}", where=self.where) from error
        tune(self._socket)

    def ask(self, request: wire.Open, *, deadline_ns: int) -> wire.Opened:
        """Send the request and return the answer; blocks until the deadline at most.

        Raises:
            RegionGone: the owner does not serve the region.
            PeerUnreachable: the owner hung up or did not answer in time.
            RemoteProtocolError: its answer makes no sense.
            TransferFailed: it refuses, and says why.
        """
        try:
            self._socket.settimeout(_left_s(deadline_ns))
            self._socket.sendall(wire.pack(request))
            length = wire.unpack_header(self._receive(wire.HEADER.size, deadline_ns))
            answer = wire.unpack_body(self._receive(length, deadline_ns))
            self._socket.setblocking(False)
        except OSError as error:
            raise PeerUnreachable(f"no answer: {error}", where=self.where) from error
        if isinstance(answer, wire.Refused):
            kind = RegionGone if answer.is_gone else TransferFailed
            raise kind(answer.reason, where=self.where)
        if not isinstance(answer, wire.Opened):
            raise RemoteProtocolError(f"the owner answered with {type(answer).__name__}", where=self.where)
        return answer

    def fileno(self) -> int:
        """Return the descriptor, which becomes readable when the connection ends."""
        return self._socket.fileno()

    def is_broken(self) -> bool:
        """Tell whether the owner hung up (or says something, which it must not)."""
        try:
            self._socket.recv(1)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def shut(self) -> None:
        """End the connection but keep the descriptor: for another thread that wants a reader to stop."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was faster

    def close(self) -> None:
        """Hang up: the owner then drops its queue pairs. Idempotent."""
        self._socket.close()

    def _receive(self, size: int, deadline_ns: int) -> bytes:
        data = b""
        while len(data) < size:
            self._socket.settimeout(_left_s(deadline_ns))
            part = self._socket.recv(size - len(data))
            if not part:
                raise ConnectionResetError("the owner hung up")
            data += part
        return data


def tune(connection: socket.socket) -> None:
    """Set what both ends want: no delay, and a dead machine noticed within half a minute."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def _left_s(deadline_ns: int) -> float:
    """Return the seconds left, never 0: a socket would take that for "do not block"."""
    return max(1e-3, (deadline_ns - time.monotonic_ns()) / 1e9)
