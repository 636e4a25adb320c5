"""Every medium keeps the transport contract."""

import functools
import os
import socket
from pathlib import Path

import pytest

from mooncake_store.testing.transport import TransportTests
from mooncake_store.transport.cma import CmaTransport
from mooncake_store.transport.loopback import LoopbackTransport
from mooncake_store.transport.shm import ShmTransport
from mooncake_store.transport.tcp import TcpTransport
from mooncake_store.transport.tls import TlsFiles, load_contexts

CERTIFICATES = Path(__file__).parent / "certificates"


def make_tls():
    """Make a member of the test cell; a function, because contexts cannot be pickled."""
    files = TlsFiles(*(str(CERTIFICATES / name) for name in ("member.pem", "member.key", "authority.pem")))
    return TcpTransport(tls=load_contexts(files))


class TestShm(TransportTests):
    make = ShmTransport
    backings = ("memfd",)
    survives_owner = True


class TestCma(TransportTests):
    make = CmaTransport
    checks_at_owner = False


class TestTcp(TransportTests):
    make = TcpTransport


class TestTcpWithoutChecksum(TransportTests):
    make = functools.partial(TcpTransport, checksum=False)


class TestTcpWithThreeStreams(TransportTests):
    make = functools.partial(TcpTransport, num_streams=3)


class TestTcpOverTls(TransportTests):
    make = staticmethod(make_tls)


@pytest.mark.skipif(not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"), reason="this machine has no IPv6")
class TestTcpOverIpv6(TransportTests):
    make = functools.partial(TcpTransport, "::1")


class TestLoopback(TransportTests):
    make = LoopbackTransport
    crosses_processes = False
