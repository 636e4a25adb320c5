"""tcp on a bad wire, strangers at the server's door, and owners that withdraw in the middle."""

import contextlib
import socket
import threading
import time

import msgspec
import numpy as np
import pytest

from mooncake_store.errors import ChecksumMismatch, PeerUnreachable, RemoteProtocolError, TransferFailed
from mooncake_store.testing.transport import Owned, Target, scattered, soon
from mooncake_store.transport import tcp_server, tcp_stream, tcp_wire
from mooncake_store.transport.base import RegionGone, TcpOffer
from mooncake_store.transport.tcp import TcpTransport


class Proxy:
    """A wire between reader and owner that can flip a byte, cut or stall; counts what the owner sent."""

    def __init__(self, port):
        self.port = port
        self.flip_at = self.cut_at = self.stall_at = -1
        self.passed = 0
        self.num_connections = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.sockets = [self.listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.port))
            self.num_connections += 1
            self.sockets += [near, far]
            threading.Thread(target=self._pass, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near, True), daemon=True).start()

    def break_all(self):
        for end in self.sockets[1:]:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # its other side was shut before

    def _pass(self, source, target, is_answer):
        try:
            while data := bytearray(source.recv(65536)):
                if is_answer:
                    start, self.passed = self.passed, self.passed + len(data)
                    if start <= self.flip_at < self.passed:
                        data[self.flip_at - start] ^= 1
                    if start <= self.cut_at < self.passed:
                        target.sendall(data[:self.cut_at - start])
                        self.cut_at = -1
                        break
                    while 0 <= self.stall_at < self.passed:
                        time.sleep(0.01)
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self):
        self.stall_at = -1
        for end in self.sockets:
            end.close()


@pytest.fixture
def wire():
    transport = TcpTransport()
    owned = Owned(transport, "private")
    proxy = Proxy(owned.descriptor.offers[0].port)
    offer = TcpOffer("127.0.0.1", proxy.listener.getsockname()[1])
    region = msgspec.structs.replace(owned.descriptor, offers=(offer,))
    attachment = TcpTransport().attach(region, deadline_ns=soon())
    yield proxy, attachment, owned
    attachment.close()
    proxy.close()
    transport.close()


def blocks(count=40, length=100_000):
    return Target(np.random.default_rng(0).permutation(count) * length, np.full(count, length))


def test_a_flipped_byte_fails_its_chunk_only(wire):
    proxy, attachment, owned = wire
    target = blocks()
    proxy.flip_at = proxy.passed + 24 + 555_555  # in the data of the first answer
    result = attachment.read(target.batch, deadline_ns=soon())
    assert isinstance(result.error, ChecksumMismatch)
    assert 1 <= int((~result.ok).sum()) <= 6
    target.check(result, owned.bytes)
    target.check(attachment.read(target.batch, deadline_ns=soon()), owned.bytes)


@pytest.mark.parametrize("offset", [3, 25, 700_000])
def test_a_cut_wire_fails_at_once_and_is_rebuilt_on_next_use(wire, offset):
    proxy, attachment, owned = wire
    target = blocks()
    proxy.cut_at = proxy.passed + offset
    started = time.monotonic()
    result = attachment.read(target.batch, deadline_ns=soon(10))
    assert time.monotonic() - started < 5
    assert isinstance(result.error, PeerUnreachable) and not result.ok.all()
    target.check(result, owned.bytes)
    before = proxy.num_connections
    again = attachment.read(target.batch, deadline_ns=soon())
    assert again.error is None and proxy.num_connections == before + 1
    target.check(again, owned.bytes)


def test_a_wire_cut_while_idle_is_noticed_before_use(wire):
    proxy, attachment, owned = wire
    target = blocks()
    assert attachment.read(target.batch, deadline_ns=soon()).error is None
    proxy.break_all()
    time.sleep(0.05)
    assert attachment.read(target.batch, deadline_ns=soon()).error is None


def test_a_stalled_wire_ends_at_the_deadline_and_writes_nothing_later(wire):
    proxy, attachment, owned = wire
    target = blocks()
    proxy.stall_at = proxy.passed + 200_000
    started = time.monotonic()
    result = attachment.read(target.batch, deadline_ns=soon(0.3))
    assert 0.25 < time.monotonic() - started < 5
    assert isinstance(result.error, TransferFailed) and "deadline" in result.error.message
    target.check(result, owned.bytes)
    proxy.stall_at = -1  # the rest arrives now, at a connection that is gone
    time.sleep(0.1)
    assert (target.memory == Target.GUARD).all()


def test_close_from_another_thread_ends_a_read(wire):
    proxy, attachment, owned = wire
    proxy.stall_at = proxy.passed
    threading.Timer(0.1, attachment.close).start()
    started = time.monotonic()
    target = blocks()
    assert not attachment.read(target.batch, deadline_ns=soon()).ok.any()
    assert time.monotonic() - started < 5


def test_strangers_are_dropped_and_readers_served(wire):
    _, attachment, owned = wire
    server = TcpTransport()
    region = Owned(server, "private").descriptor
    address = ("127.0.0.1", region.offers[0].port)
    header = tcp_wire.HEADER
    too_many = header.pack(tcp_wire.MAGIC, tcp_wire.VERSION, 0, 1, tcp_wire.FRAME_READS_MAX + 1, 5)
    for garbage in (b"GET / HTTP/1.1\r\n\r\n      ", b"\0" * 64, header.pack(tcp_wire.MAGIC, 9, 0, 1, 0, 5), too_many,
                    header.pack(tcp_wire.MAGIC, tcp_wire.VERSION, 0xFF, 1, 0, 5)):
        with socket.create_connection(address, timeout=5) as stranger:
            stranger.sendall(garbage)
            assert stranger.recv(100) == b""
    reader = server.attach(region, deadline_ns=soon())
    target = Target(np.array([0]), np.array([8]))
    assert reader.read(target.batch, deadline_ns=soon()).error is None
    reader.close()
    server.close()


@pytest.mark.parametrize(("reads", "status"), [
    ([[1 << 40, 8]], tcp_wire.OUT_OF_BOUNDS),
    ([[(8 << 20) - 4, 8]], tcp_wire.OUT_OF_BOUNDS),
    ([[2**64 - 4, 8]], tcp_wire.OUT_OF_BOUNDS),
    ([[0, 0]], tcp_wire.BAD_REQUEST),
    ([[0, tcp_wire.FRAME_MAX_BYTES]] * 2, tcp_wire.BAD_REQUEST),
    ([[0, 2**64 - 1]] * 2, tcp_wire.BAD_REQUEST),
])
def test_the_server_checks_every_read_itself(reads, status):
    server = TcpTransport()
    region = Owned(server, "private").descriptor
    request = tcp_wire.Request(0, 77, len(reads), region.region_id)
    with socket.create_connection(("127.0.0.1", region.offers[0].port), timeout=5) as client:
        client.sendall(tcp_wire.pack_request(request, np.array(reads, np.uint64)))
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert tcp_wire.unpack_response(answer) == tcp_wire.Response(status, 77, len(reads), 0)
    server.close()


def test_half_a_request_costs_no_processor_time():
    server = TcpTransport()
    region = Owned(server, "private").descriptor
    with socket.create_connection(("127.0.0.1", region.offers[0].port), timeout=5) as client:
        client.sendall(tcp_wire.pack_request(tcp_wire.Request(0, 1, 2, region.region_id), np.zeros((1, 2), np.uint64)))
        time.sleep(0.05)
        used = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - used < 0.1
    server.close()


def test_more_connections_than_allowed_are_turned_away(monkeypatch):
    monkeypatch.setattr(tcp_server, "CONNECTIONS_MAX", 2)
    server = TcpTransport()
    region = Owned(server, "private").descriptor
    attachments = [server.attach(region, deadline_ns=soon()) for _ in range(2)]
    with pytest.raises(PeerUnreachable):
        server.attach(region, deadline_ns=soon())
    attachments.pop().close()
    for _ in range(100):  # the server notices that one left
        try:
            attachments.append(server.attach(region, deadline_ns=soon()))
            break
        except PeerUnreachable:
            time.sleep(0.02)
    assert len(attachments) == 2
    for attachment in attachments:
        attachment.close()
    server.close()


def test_a_withdrawal_in_the_middle_fails_the_read_and_never_touches_the_memory_after():
    server = TcpTransport()
    owned = Owned(server, "private", 32 << 20)
    attachment = server.attach(owned.descriptor, deadline_ns=soon())
    target = scattered(np.random.default_rng(0), 2000, 16_384, 32 << 20)
    source = owned.bytes.copy()
    threading.Timer(0.003, server.withdraw, (owned.descriptor.region_id,)).start()
    for _ in range(100):
        result = attachment.read(target.batch, deadline_ns=soon())
        if result.error is not None:
            break
    assert isinstance(result.error, PeerUnreachable)
    target.check(result, source)
    with pytest.raises(RegionGone):
        server.attach(owned.descriptor, deadline_ns=soon())
    attachment.close()
    server.close()


@pytest.fixture
def hasty(monkeypatch):
    """A server that waits for nobody longer than a third of a second."""
    monkeypatch.setattr(tcp_server, "STEP_MAX_S", 0.3)
    monkeypatch.setattr(tcp_server, "TURN_S", 0.05)
    server = TcpTransport()
    yield server, Owned(server, "private", 64 << 20)
    server.close()


def ask(region, num_reads=2, length=4 << 20):
    """Return a request for reads that fill the sockets' buffers."""
    reads = np.column_stack((np.arange(num_reads) * length, np.full(num_reads, length))).astype(np.uint64)
    return tcp_wire.pack_request(tcp_wire.Request(0, 1, num_reads, region.region_id), reads)


def dropped_after(sock, *, patience_s=10):
    """Return the seconds until the server closed this connection; whatever it still had to say is taken first."""
    started = time.monotonic()
    sock.settimeout(patience_s)
    try:
        while sock.recv(1 << 20):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - started


def test_a_reader_that_takes_nothing_is_dropped_and_others_are_served(hasty):
    server, owned = hasty
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        stalled.connect(("127.0.0.1", owned.descriptor.offers[0].port))
        stalled.sendall(ask(owned.descriptor))
        attachment = server.attach(owned.descriptor, deadline_ns=soon())
        target = blocks()
        target.check(attachment.read(target.batch, deadline_ns=soon()), owned.bytes)
        attachment.close()
        time.sleep(0.6)
        received = 0
        with pytest.raises((ConnectionResetError, EOFError)):
            while data := stalled.recv(1 << 20):
                received += len(data)
            raise EOFError
        assert received < 8 << 20


def test_a_reader_that_takes_a_little_at_a_time_is_dropped_too(hasty):
    _, owned = hasty
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        slow.connect(("127.0.0.1", owned.descriptor.offers[0].port))
        slow.sendall(ask(owned.descriptor))
        started, received = time.monotonic(), 0
        try:
            while (data := slow.recv(4096)) and time.monotonic() - started < 10:
                received += len(data)
                time.sleep(0.005)
        except ConnectionResetError:
            pass
        assert time.monotonic() - started < 9 and received < 8 << 20


def test_a_request_that_never_ends_is_dropped(hasty):
    _, owned = hasty
    with socket.create_connection(("127.0.0.1", owned.descriptor.offers[0].port)) as client:
        client.sendall(ask(owned.descriptor)[:30])
        assert dropped_after(client) < 9


def test_an_idle_connection_is_closed_and_its_reader_opens_another(monkeypatch):
    monkeypatch.setattr(tcp_server, "IDLE_MAX_S", 0.2)
    monkeypatch.setattr(tcp_server, "TURN_S", 0.05)
    server = TcpTransport()
    owned = Owned(server, "private")
    attachment = server.attach(owned.descriptor, deadline_ns=soon())
    for length in (100, 100_000):  # the short path and the long one
        time.sleep(0.5)
        target = Target(np.array([5]), np.array([length]))
        target.check(result := attachment.read(target.batch, deadline_ns=soon()), owned.bytes)
        assert result.error is None
    attachment.close()
    server.close()


def test_requests_sent_without_reading_answers_do_not_pile_up():
    server = TcpTransport()
    owned = Owned(server, "private", 64 << 20)
    with socket.create_connection(("127.0.0.1", owned.descriptor.offers[0].port)) as flood:
        flood.setblocking(False)
        sent, request = 0, ask(owned.descriptor)
        stop = time.monotonic() + 10
        while time.monotonic() < stop and sent < 64 << 20:
            try:
                sent += flood.send(request * 1000)
            except BlockingIOError:
                if sent > 1 << 20:
                    break
                time.sleep(0.01)
        assert sent < 64 << 20, "the server took in requests while it could not answer"
        attachment = server.attach(owned.descriptor, deadline_ns=soon())
        target = blocks()
        target.check(result := attachment.read(target.batch, deadline_ns=soon()), owned.bytes)
        assert result.error is None
        attachment.close()
    server.close()


@pytest.mark.parametrize(("source", "is_near"), [("127.0.0.1", True), ("127.0.0.2", False)])
def test_only_within_a_machine_is_the_queue_cut_to_the_cache(source, is_near):
    with (socket.create_server(("127.0.0.1", 0)) as listener,
          socket.create_connection(listener.getsockname(), source_address=(source, 0)) as connection):
        before = connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        tcp_stream.tune(connection)
        after = connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        assert after == (2 * tcp_stream.SEND_BUFFER_BYTES if is_near else before)  # the kernel doubles what it is told


@pytest.mark.parametrize("offset", [3, 25, 30])
def test_a_lone_read_survives_a_cut_and_a_slow_wire(wire, offset):
    proxy, attachment, owned = wire
    target = Target(np.array([7]), np.array([50_000]))
    assert attachment.read(target.batch, deadline_ns=soon()).error is None
    proxy.cut_at = proxy.passed + offset
    result = attachment.read(target.batch, deadline_ns=soon())
    assert isinstance(result.error, PeerUnreachable)
    target.check(result, owned.bytes)
    target.check(result := attachment.read(target.batch, deadline_ns=soon()), owned.bytes)
    assert result.error is None
    proxy.stall_at = proxy.passed + offset
    result = attachment.read(target.batch, deadline_ns=soon(0.3))
    assert isinstance(result.error, TransferFailed) and "deadline" in result.error.message
    proxy.stall_at = -1
    target.check(result, owned.bytes)
    target.check(result := attachment.read(target.batch, deadline_ns=soon()), owned.bytes)
    assert result.error is None


def test_a_flipped_byte_in_a_lone_read_is_noticed(wire):
    proxy, attachment, owned = wire
    target = Target(np.array([7]), np.array([50_000]))
    proxy.flip_at = proxy.passed + 24 + 777
    result = attachment.read(target.batch, deadline_ns=soon())
    assert isinstance(result.error, ChecksumMismatch)
    target.check(result, owned.bytes)
    assert attachment.read(target.batch, deadline_ns=soon()).error is None


@pytest.mark.parametrize("length", [50_000, 3_000_000])
def test_what_the_caller_verifies_travels_without_checksums(wire, length):
    proxy, attachment, owned = wire
    target = Target(np.array([7]), np.array([length]))
    target.batch = msgspec.structs.replace(target.batch, is_verified_later=True)
    before = proxy.passed
    assert attachment.read(target.batch, deadline_ns=soon()).error is None
    assert proxy.passed - before == length + tcp_wire.HEADER_BYTES
    proxy.flip_at = proxy.passed + 24 + 777
    assert attachment.read(target.batch, deadline_ns=soon()).error is None
    assert int((target.memory[:length] != owned.bytes[7:7 + length]).sum()) == 1


@pytest.mark.parametrize("length", [100, 3_000_000])
def test_an_answer_to_another_question_is_not_taken(length):
    """An owner that numbers its answers wrongly, or says another length."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = TcpTransport()
    region = Owned(server, "private").descriptor
    wrong = iter([(1, 0), (0, 1)])

    def answer():
        for _ in range(2):
            peer, _ = listener.accept()
            with peer:
                frame_id = tcp_wire.unpack_request(peer.recv(24)).frame_id
                peer.sendall(tcp_wire.pack_response(tcp_wire.Response(tcp_wire.OK, frame_id, 0, 0)))
                request = tcp_wire.unpack_request(peer.recv(24, socket.MSG_WAITALL))
                later, longer = next(wrong)
                with contextlib.suppress(ConnectionError):  # the reader hangs up as soon as it sees what this is
                    peer.sendall(tcp_wire.pack_response(tcp_wire.Response(
                        tcp_wire.OK, request.frame_id + later, request.num_reads, length + longer)) + bytes(length))
                    peer.recv(1)

    thread = threading.Thread(target=answer)
    thread.start()
    offer = TcpOffer("127.0.0.1", listener.getsockname()[1])
    for _ in range(2):
        attachment = TcpTransport(checksum=False).attach(
            msgspec.structs.replace(region, offers=(offer,)), deadline_ns=soon())
        target = Target(np.array([0]), np.array([length]))  # kept: its memory is written to
        result = attachment.read(target.batch, deadline_ns=soon())
        assert isinstance(result.error, RemoteProtocolError) and not result.ok.any()
        attachment.close()
    thread.join(5)
    listener.close()
    server.close()
