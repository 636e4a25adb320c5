"""Read memory of this very process: for our own segment, and for tests."""

from __future__ import annotations

import os
import threading

from mooncake_store.transport.base import (
    LocalMemory,
    LoopbackOffer,
    ReadBatch,
    ReadResult,
    RegionDescriptor,
    RegionGone,
)
from mooncake_store.transport.copying import copy_batch


class LoopbackTransport:
    """Serves regions to readers that hold this same object. Implements ``base.Transport``."""

    medium = "loopback"

    def __init__(self) -> None:
        self._regions: dict[int, LocalMemory] = {}
        self._lock = threading.Lock()

    def serve(self, region_id: int, memory: LocalMemory) -> LoopbackOffer:
        """Remember the memory; any memory will do."""
        with self._lock:
            self._regions[region_id] = memory
        return LoopbackOffer(os.getpid(), memory.address)

    def withdraw(self, region_id: int) -> None:
        """Forget the memory. Idempotent."""
        with self._lock:
            self._regions.pop(region_id, None)

    def lookup(self, region_id: int) -> LocalMemory | None:
        """Return the memory that is served under this id, None when there is none."""
        with self._lock:
            return self._regions.get(region_id)

    def attach(self, region: RegionDescriptor, *, deadline_ns: int) -> LoopbackAttachment:
        """Open one of our own regions.

        Raises:
            RegionGone: it is not ours, or no longer served.
        """
        offers = [offer for offer in region.offers if isinstance(offer, LoopbackOffer)]
        memory = self.lookup(region.region_id)
        if memory is None or (offers and offers[0].pid != os.getpid()):
            raise RegionGone(f"this process does not serve region {region.region_id:#x}", where="loopback")
        return LoopbackAttachment(self, region)

    def close(self) -> None:
        """Withdraw everything. Idempotent."""
        with self._lock:
            self._regions.clear()


class LoopbackAttachment:
    """Copies within the process; the region is looked up at every read. Implements ``base.Attachment``."""

    medium = "loopback"

    def __init__(self, transport: LoopbackTransport, region: RegionDescriptor) -> None:
        self._transport: LoopbackTransport | None = transport
        self._region = region

    def read(self, batch: ReadBatch, *, deadline_ns: int) -> ReadResult:
        """Copy the batch; see ``base.Attachment.read``."""
        batch.check(self._region.size_bytes)
        memory = self._transport.lookup(self._region.region_id) if self._transport is not None else None
        if memory is None or memory.size_bytes < self._region.size_bytes:
            return ReadResult.failed(batch, RegionGone("region is withdrawn, or the attachment closed",
                                                            where="loopback"))
        # `memory` holds a reference to the owner object, so a withdrawal meanwhile does not unmap it under us
        return copy_batch(batch, memory.address, medium=self.medium, deadline_ns=deadline_ns)

    def close(self) -> None:
        """Forget the region. Idempotent."""
        self._transport = None
