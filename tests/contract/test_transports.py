"""Every medium keeps the transport contract."""

import functools

from mooncake_store.testing.transport import TransportTests
from mooncake_store.transport.cma import CmaTransport
from mooncake_store.transport.loopback import LoopbackTransport
from mooncake_store.transport.shm import ShmTransport
from mooncake_store.transport.tcp import TcpTransport


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
    make = functools.partial(TcpTransport, num_streams=1, checksum=False)


class TestLoopback(TransportTests):
    make = LoopbackTransport
    crosses_processes = False
