"""rdma keeps the transport contract on devices that are faked with process_vm_readv."""

from mooncake_store.testing.transport import TransportTests
from mooncake_store.testing.verbs import FakeVerbs
from mooncake_store.transport.rdma.transport import RdmaTransport


def make():
    return RdmaTransport(backend=FakeVerbs())


class TestRdmaOnFakeDevices(TransportTests):
    make = staticmethod(make)
