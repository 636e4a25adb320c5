"""Large batches use both rails and read straight into registered memory, and cost little Python per work request.

Runs inside the guest of test_in_guest.py.
"""

import json
from pathlib import Path

import numpy as np
import rdma_wr_cost

from mooncake_store.testing.transport import OwnerProcess, pattern, soon
from mooncake_store.transport.base import LocalMemory, ReadBatch
from mooncake_store.transport.rdma.transport import RdmaTransport

RESULTS = Path("/run/job/results")
NUM_BLOCKS, BLOCK_BYTES = 4096, 16384


def received_packets(device):
    return int(Path(f"/sys/class/infiniband/{device}/ports/1/hw_counters/rcvd_pkts").read_text())


def test_4096_scattered_blocks_from_another_process_over_both_rails():
    size_bytes = NUM_BLOCKS * BLOCK_BYTES
    owner, reader = OwnerProcess(RdmaTransport, "private", size_bytes), RdmaTransport()
    target = np.zeros(size_bytes, np.uint8)
    reader.serve(3, LocalMemory(target.ctypes.data, size_bytes, owner=target))
    rng = np.random.default_rng(5)
    sources, targets = rng.permutation(NUM_BLOCKS), rng.permutation(NUM_BLOCKS)
    batch = ReadBatch((sources * BLOCK_BYTES).astype(np.uint64),
                      (targets * BLOCK_BYTES).astype(np.uint64) + np.uint64(target.ctypes.data),
                      np.full(NUM_BLOCKS, BLOCK_BYTES, np.uint64))
    try:
        before = {device: received_packets(device) for device in ("rxe0", "rxe1")}
        attachment = reader.attach(owner.descriptor, deadline_ns=soon())
        result = attachment.read(batch, deadline_ns=soon(60.0))
        assert result.error is None and result.ok.all() and result.num_bytes == size_bytes
        source = pattern(size_bytes, 1).reshape(NUM_BLOCKS, BLOCK_BYTES)
        assert np.array_equal(target.reshape(NUM_BLOCKS, BLOCK_BYTES)[targets], source[sources])
        assert attachment._bounce is None, "registered memory is read into without a copy"
        shares = {device: num_bytes / size_bytes for device, num_bytes in attachment.read_bytes.items()}
        assert set(shares) == {"rxe0", "rxe1"} and min(shares.values()) > 0.4, shares
        for device, packets in before.items():  # as the devices themselves count
            assert (received_packets(device) - packets) * 4096 > 0.4 * size_bytes
        attachment.close()
    finally:
        reader.close()
        owner.close()


def test_what_a_work_request_costs_in_python():
    rows = rdma_wr_cost.measure(num_chains=12)
    print()
    for row in rows:
        print("rdma_wr_cost:", row)
    assert {row["way"] for row in rows} == {"extended", "classic"} and all(row["per_read_us"] > 0 for row in rows)
    (RESULTS / "rdma_wr_cost.json").write_text(json.dumps(rows, indent=2))
