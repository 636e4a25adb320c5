"""Move bytes between memory ranges and a connection, plain or under TLS, for both ends of the tcp medium.

Plain connections take a whole list of ranges per system call. TLS has no such call: it is handed one range at a time,
and encrypts from, or decrypts into, the memory itself.
"""

from __future__ import annotations

import socket
import ssl
from typing import Any

import numpy.typing as npt

from mooncake_store.transport import libc

WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
"""What a connection raises when nothing can be done now."""

SEND_BUFFER_BYTES = 512 << 10
"""Bytes under way on a connection. Left to itself the kernel queues up to 4 MiB, which falls out of the cache before
the reader copies it: 64 MiB over loopback then take 3.4 to 4.8 memcpys instead of 2.9."""
TLS_WRITE_BYTES = 256 << 10
TLS_CALL_BYTES = 1 << 20
"""Bytes of one call under TLS, so that the deadline is looked at every millisecond or two."""

SPACE = libc.address_space()


def tune(connection: socket.socket) -> None:
    """Set what both ends want: no delay, a dead peer noticed within half a minute, and a queue that fits the cache."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)


def send_ranges(connection: socket.socket, ranges: npt.NDArray[Any]) -> int:
    """Send some of memory ranges, uint64 [n, 2] of (address, length); return bytes sent. Raises WOULD_BLOCK, OSError.

    After WOULD_BLOCK the next call must offer the same bytes again.
    """
    if not isinstance(connection, ssl.SSLSocket):
        return libc.send_ranges(connection.fileno(), ranges)
    sent = 0
    for address, length in ranges.tolist():
        end = address + length
        while address < end:
            try:
                count = connection.send(SPACE[address:min(address + TLS_WRITE_BYTES, end)])
            except WOULD_BLOCK:
                if sent:
                    return sent
                raise
            address += count
            sent += count
        if sent >= TLS_CALL_BYTES:
            break
    return sent


def receive_ranges(connection: socket.socket, ranges: npt.NDArray[Any]) -> int:
    """Receive into some of memory ranges; return bytes received, 0 at end of stream. Raises WOULD_BLOCK, OSError."""
    if not isinstance(connection, ssl.SSLSocket):
        return libc.receive_ranges(connection.fileno(), ranges)
    received = 0
    for address, length in ranges.tolist():
        end = address + length
        while address < end:
            try:
                count = connection.recv_into(SPACE[address:end])
            except WOULD_BLOCK:
                if received:
                    return received
                raise
            if count == 0:
                return received
            address += count
            received += count
        if received >= TLS_CALL_BYTES:
            break
    return received


def has_pending(connection: socket.socket) -> bool:
    """Tell whether bytes have been taken from the network and decrypted already: no poll will report them."""
    return isinstance(connection, ssl.SSLSocket) and connection.pending() > 0


def hang_up(connection: socket.socket) -> None:
    """Wake whoever waits for this connection; closing it would hand its descriptor to someone else.

    The method of SSLSocket would also make it a plain socket, on which the waiter would take ciphertext for data.
    """
    try:
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
    except OSError:
        pass  # the peer was faster
