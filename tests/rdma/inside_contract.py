"""rdma keeps the transport contract on soft-RoCE devices: both ends on real verbs, over two rails.

Runs inside the guest of test_in_guest.py.
"""

import functools
import logging

import numpy as np

from mooncake_store.testing.transport import TransportTests, scattered, soon
from mooncake_store.transport.rdma.transport import RdmaTransport
from mooncake_store.transport.rdma.verbs import VerbsBackend, load


class TestRdma(TransportTests):
    make = RdmaTransport

    def test_it_says_that_it_is_usable(self):
        transport = RdmaTransport()
        assert transport.probe() == ""
        transport.close()


class TestWithoutTheExtendedApi(TransportTests):
    """Only what depends on how work requests are made: the whole kit twice would take too long under emulation."""

    make = functools.partial(RdmaTransport, backend=VerbsBackend(is_classic=True))
    __test__ = False


def test_providers_without_the_extended_api_are_read_with_classic_requests():
    with TestWithoutTheExtendedApi().pair() as pair:
        attachment = pair.attach()
        for seed in range(3):
            target = scattered(np.random.default_rng(seed), 300, 5000)
            result = attachment.read(target.batch, deadline_ns=soon())
            assert result.error is None
            target.check(result, pair.bytes)
        assert type(attachment._connection.lanes[0].queue_set).__name__ == "ClassicQueues"


def test_importing_pyverbs_leaves_the_root_logger_alone():
    root = logging.getLogger()
    before = root.handlers[:], root.level
    load.__globals__["_loaded"].clear()
    load()
    assert (root.handlers, root.level) == before


def test_an_address_index_that_the_user_insists_on_is_used():
    rails = VerbsBackend(gid_index=1).rails()
    assert [[gid.table_index for gid in rail.gids] for rail in rails] == [[1], [1]]
    assert [rail.device for rail in VerbsBackend(device_names=("rxe1",)).rails()] == ["rxe1"]
    assert "no active RDMA port among mlx5_9" in VerbsBackend(device_names=("mlx5_9",)).probe()
