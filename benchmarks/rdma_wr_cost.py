"""What one RDMA read costs in Python: extended queue pairs against an SGE and a SendWR object per read.

Chains of 256 reads are built on a real device and taken back, so no byte moves: only Python and the library count.
Soft-RoCE will do; without any device: ``python tests/rdma/guest.py PYTHON benchmarks/rdma_wr_cost.py``, whose emulated
times are only good as ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import harness
import numpy as np

from mooncake_store.transport.rdma.backend import Queue, Reads, Route
from mooncake_store.transport.rdma.chains import CHAIN_READS_MAX
from mooncake_store.transport.rdma.queues import ClassicQueues, ExtendedQueues
from mooncake_store.transport.rdma.verbs import VerbsBackend

READ_BYTES = 4096
NUM_CHAINS = 40


def measure(*, num_chains: int = NUM_CHAINS) -> list[dict[str, Any]]:
    """Return one row per way with the median time per read in us; `ratio` is relative to the extended way."""
    rows = []
    for way, is_classic in (("extended", False), ("classic", True)):
        backend = VerbsBackend(is_classic=is_classic)
        rail = backend.rails()[0]
        device = backend.open(rail)
        memory = np.zeros(CHAIN_READS_MAX * READ_BYTES, np.uint8)
        registration = device.register(memory.ctypes.data, memory.nbytes, is_target=True)
        queues, peer = device.open_queues(1, is_reader=True), device.open_queues(1, is_reader=False)
        gid = rail.gids[-1]
        route = Route(gid.table_index, gid.raw, rail.lid, rail.link_layer == "ethernet", device.mtu, device.reads_max)
        peer.connect(route, (Queue(*queues.queues[0]),), is_reader=False)
        queues.connect(route, (Queue(*peer.queues[0]),), is_reader=True)
        addresses = (np.arange(CHAIN_READS_MAX) * READ_BYTES + memory.ctypes.data).tolist()
        reads = Reads(registration.rkey, registration.lkey, addresses, addresses, [READ_BYTES] * CHAIN_READS_MAX)
        build = _builder(queues, reads)
        build()
        times = []
        for _ in range(num_chains):
            began = time.perf_counter()
            build()
            times.append(time.perf_counter() - began)
        rows.append({"way": way, "per_read_us": round(statistics.median(times) / CHAIN_READS_MAX * 1e6, 3)})
        for part in (queues, peer, registration, device):
            part.close()
    for row in rows:
        row["ratio"] = round(row["per_read_us"] / rows[0]["per_read_us"], 1)
    return rows


def _builder(queues: Any, reads: Reads) -> Callable[[], None]:
    def extended() -> None:
        queues.fill(0, 0, reads)
        queues.abort(0)

    def classic() -> None:
        for request in queues.build(0, reads):
            request.close()

    assert isinstance(queues, ClassicQueues)
    return extended if isinstance(queues, ExtendedQueues) else classic


def main() -> None:
    args = harness.parser(__doc__.splitlines()[0]).parse_args()
    obstacle = VerbsBackend().probe()
    rows = [] if obstacle else measure(num_chains=10 if args.quick else NUM_CHAINS)
    harness.publish(args, rows, title="Python per RDMA read (classic: ratio >= 8 expected)",
                    notes=[f"left out: {obstacle}"] if obstacle else [])


if __name__ == "__main__":
    harness.run(main)
