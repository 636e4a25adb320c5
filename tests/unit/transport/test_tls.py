"""TLS on the tcp medium: who is let in, what is on the wire, which settings are refused."""

import contextlib
import os
import socket
import ssl
import struct
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from mooncake_store.errors import ConfigError, PeerUnreachable, TransferFailed
from mooncake_store.testing.transport import Owned, Target, soon
from mooncake_store.transport import tcp_server
from mooncake_store.transport.base import TcpOffer
from mooncake_store.transport.tcp import TcpTransport
from mooncake_store.transport.tls import TlsFiles, load_contexts

CERTIFICATES = Path(__file__).parents[2] / "contract" / "certificates"


def path(name):
    return str(CERTIFICATES / name)


MEMBER = TlsFiles(path("member.pem"), path("member.key"), path("authority.pem"))
STRANGER = TlsFiles(path("stranger.pem"), path("stranger.key"), path("authority.pem"))


@pytest.fixture
def owned():
    transport = TcpTransport(tls=load_contexts(MEMBER))
    yield Owned(transport, "private")
    transport.close()


def read(attachment, source):
    target = Target(np.arange(40) * 100_000, np.full(40, 100_000))
    target.check(result := attachment.read(target.batch, deadline_ns=soon()), source)
    return result


def test_a_member_of_another_cell_is_turned_away_and_members_are_served_on(owned):
    with pytest.raises((TransferFailed, PeerUnreachable), match="TLS|broke|hung up"):
        TcpTransport(tls=load_contexts(STRANGER)).attach(owned.descriptor, deadline_ns=soon())
    attachment = TcpTransport(tls=load_contexts(MEMBER)).attach(owned.descriptor, deadline_ns=soon())
    assert read(attachment, owned.bytes).error is None
    attachment.close()


def test_an_owner_of_another_cell_is_not_believed():
    stranger = TcpTransport(tls=load_contexts(STRANGER))
    region = Owned(stranger, "private").descriptor
    with pytest.raises(TransferFailed, match="(?i)certificate.*verify.*failed"):
        TcpTransport(tls=load_contexts(MEMBER)).attach(region, deadline_ns=soon())
    stranger.close()


def test_a_reader_without_a_certificate_gets_nothing(owned):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", owned.descriptor.offers[0].port), timeout=5) as sock:
        try:
            with context.wrap_socket(sock) as wrapped:
                assert wrapped.recv(100) == b""
        except OSError as error:
            assert "CERTIFICATE_REQUIRED" in str(error) or isinstance(error, ConnectionResetError)


def test_both_ends_must_agree_on_tls(owned):
    with pytest.raises(TransferFailed, match="the owner uses TLS and this process does not") as caught:
        TcpTransport().attach(owned.descriptor, deadline_ns=soon())
    assert "tls_cert" in caught.value.hint
    plain = TcpTransport()
    region = Owned(plain, "private").descriptor
    with pytest.raises(TransferFailed, match="this process uses TLS and the owner does not"):
        TcpTransport(tls=load_contexts(MEMBER)).attach(region, deadline_ns=soon())
    plain.close()


def test_nothing_readable_is_on_the_wire(owned):
    seen = bytearray()
    listener = socket.create_server(("127.0.0.1", 0))

    def tap():
        near, _ = listener.accept()
        far = socket.create_connection(("127.0.0.1", owned.descriptor.offers[0].port))

        def forward(source, target):
            while data := source.recv(65536):
                seen.extend(data)
                target.sendall(data)
            with contextlib.suppress(OSError):  # the other direction ended first
                target.shutdown(socket.SHUT_WR)

        back = threading.Thread(target=forward, args=(far, near))
        back.start()
        forward(near, far)
        back.join()
        near.close()
        far.close()

    thread = threading.Thread(target=tap)
    thread.start()
    offer = TcpOffer("127.0.0.1", listener.getsockname()[1], is_tls=True)
    region = msgspec.structs.replace(owned.descriptor, offers=(offer,))
    attachment = TcpTransport(tls=load_contexts(MEMBER), num_streams=1).attach(region, deadline_ns=soon())
    assert read(attachment, owned.bytes).error is None
    attachment.close()
    thread.join(5)
    listener.close()
    assert len(seen) > 4_000_000
    assert b"MTCP" not in seen and owned.bytes[1000:1016].tobytes() not in seen


def test_a_read_closed_from_another_thread_never_takes_ciphertext_for_data(owned):
    for _ in range(5):
        attachment = TcpTransport(tls=load_contexts(MEMBER), num_streams=1).attach(owned.descriptor, deadline_ns=soon())
        threading.Timer(0.002, attachment.close).start()
        while (result := read(attachment, owned.bytes)).error is None:
            pass
        assert not result.ok.all()


def test_a_greeting_that_stalls_is_dropped(owned, monkeypatch):
    monkeypatch.setattr(tcp_server, "STEP_MAX_S", 0.2)
    monkeypatch.setattr(tcp_server, "TURN_S", 0.05)
    with socket.create_connection(("127.0.0.1", owned.descriptor.offers[0].port), timeout=10) as sock:
        started = time.monotonic()
        assert sock.recv(100) == b""
        assert time.monotonic() - started < 9


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # ssl leaves its half-made sockets
def test_strangers_that_leave_at_once_do_not_end_the_server(owned):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(300):
        with socket.create_connection(("127.0.0.1", owned.descriptor.offers[0].port), timeout=5) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets
    attachment = TcpTransport(tls=load_contexts(MEMBER)).attach(owned.descriptor, deadline_ns=soon())
    assert read(attachment, owned.bytes).error is None
    attachment.close()
    for _ in range(100):
        if len(os.listdir("/proc/self/fd")) <= before:
            break
        time.sleep(0.05)  # the server notices
    assert len(os.listdir("/proc/self/fd")) <= before


def test_no_files_mean_no_tls():
    assert load_contexts(TlsFiles()) is None


@pytest.mark.parametrize(("files", "where", "text"), [
    (TlsFiles(certificate=path("member.pem")), "$.tls_key", "tls_key and tls_ca must be set too"),
    (TlsFiles(path("member.pem"), path("member.key")), "$.tls_ca", "tls_ca must be set too"),
    (TlsFiles("/nowhere.pem", path("member.key"), path("authority.pem")), "$.tls_cert", "cannot read /nowhere.pem"),
    (TlsFiles(path("member.pem"), path("member.key"), path("make.sh")), "$.tls_ca", "is no PEM file"),
    (TlsFiles(path("member.pem"), path("member.key"), path("member.key")), "$.tls_ca", "holds no certificate"),
    (TlsFiles(path("member.pem"), path("stranger.key"), path("authority.pem")), "$.tls_cert", "mismatch"),
    (TlsFiles(path("member.key"), path("member.key"), path("authority.pem")), "$.tls_cert", "cannot be used"),
])
def test_wrong_files_are_explained(files, where, text):
    with pytest.raises(ConfigError, match=text) as caught:
        load_contexts(files)
    assert where in caught.value.where and caught.value.hint
