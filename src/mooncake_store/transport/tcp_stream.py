"""Move bytes between memory ranges and a connection, plain or under TLS, for both ends of the tcp medium.

Plain connections take a whole list of ranges per system call. TLS has no such call: it is handed one range at a time,
and encrypts from, or decrypts into, the memory itself.
"""

from __future__ import annotations

import socket
import ssl

from mooncake_store.transport import libc
from mooncake_store.transport.cursor import RangeCursor

WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
"""What a connection raises when nothing can be done now."""

SEND_BUFFER_BYTES = 512 << 10
"""Bytes under way on a connection within a machine. Left to itself the kernel queues up to 4 MiB, which falls out of
the cache before the reader copies it: 64 MiB over loopback then take 3.4 to 4.8 memcpys instead of 2.9. Between
machines the kernel knows better: there the round trip says how much must be under way."""
TLS_WRITE_BYTES = 256 << 10
TLS_CALL_BYTES = 1 << 20
"""Bytes of one call under TLS, so that the deadline is looked at every millisecond or two."""

SPACE = libc.address_space()


def tune(connection: socket.socket) -> None:
    """Set what both ends of a stream of blocks want: as ``quicken``, and a queue that fits the cache.

    Raises:
        OSError: the peer has gone.
    """
    quicken(connection)
    if connection.getsockname()[0] == connection.getpeername()[0]:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)


def quicken(connection: socket.socket) -> None:
    """Let calls never wait, messages leave at once, and a dead peer be noticed within half a minute."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def send(connection: socket.socket, cursor: RangeCursor) -> bool:
    """Send some of the memory that a cursor stands before; return whether the connection may take more now.

    After WOULD_BLOCK the next call must offer the same bytes again. Raises WOULD_BLOCK, OSError.
    """
    if not isinstance(connection, ssl.SSLSocket):
        return cursor.advance(libc.send_ranges(connection.fileno(), *cursor.vector()))
    sent = 0
    for address, length in cursor.window().tolist():
        end = address + length
        while address < end:
            try:
                count = connection.send(SPACE[address:min(address + TLS_WRITE_BYTES, end)])
            except WOULD_BLOCK:
                cursor.advance(sent)
                if sent:
                    return False
                raise
            address += count
            sent += count
        if sent >= TLS_CALL_BYTES:
            break
    cursor.advance(sent)
    return True


def receive(connection: socket.socket, cursor: RangeCursor) -> bool:
    """Receive into some of the memory that a cursor stands before; return whether there may be more now.

    Raises:
        WOULD_BLOCK, OSError: also when the peer has hung up.
    """
    if not isinstance(connection, ssl.SSLSocket):
        count = libc.receive_ranges(connection.fileno(), *cursor.vector())
        if count == 0:
            raise ConnectionResetError("the owner hung up")
        return cursor.advance(count)
    received = 0
    try:
        for address, length in cursor.window().tolist():
            end = address + length
            while address < end:
                count = connection.recv_into(SPACE[address:end])
                if count == 0:
                    raise ConnectionResetError("the owner hung up")
                address += count
                received += count
            if received >= TLS_CALL_BYTES:
                break
    except WOULD_BLOCK:
        if received == 0:
            raise
        cursor.advance(received)
        return False
    cursor.advance(received)
    return True


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
