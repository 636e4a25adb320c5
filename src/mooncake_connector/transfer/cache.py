"""Serve one worker's KV cache, and read another's: one address space, in as many regions as the engine allocated.

A layout's offsets count from one base address. An engine that allocates each layer by itself leaves other memory
between its pages; only the spans that hold pages are served, and a read that touches anything else is refused.
"""

from __future__ import annotations

import msgspec
import numpy as np

from mooncake_connector.kv.fingerprint import Fingerprint
from mooncake_connector.kv.layout import KVLayout
from mooncake_connector.transfer.messages import CachePart
from mooncake_store.errors import MooncakeError, RemoteProtocolError
from mooncake_store.transport.base import LocalMemory, ReadBatch, ReadResult
from mooncake_store.transport.media import Media
from mooncake_store.types import Extent


class CacheMemory(msgspec.Struct, frozen=True):
    """One worker's KV cache: where it is, how it is laid out, what it is compatible with.

    Attributes:
        address: where the layout's offset 0 is.
        spans: parts of the layout's address space that hold pages; empty = all of it.
        owner: kept alive as long as the cache is served.
    """

    address: int
    layout: KVLayout
    fingerprint: Fingerprint
    owner: object
    spans: tuple[Extent, ...] = ()

    @property
    def mapped(self) -> tuple[Extent, ...]:
        """Return the parts that hold pages."""
        return self.spans or (Extent(0, self.layout.size_bytes),)


def serve_cache(media: Media, cache: CacheMemory) -> tuple[CachePart, ...]:
    """Let peers read every span. Raises: TransferFailed when no medium can serve such memory."""
    return tuple(CachePart(span.offset, media.serve(LocalMemory(cache.address + span.offset, span.length,
                                                                owner=cache.owner)))
                 for span in cache.mapped)


class AttachedCache:
    """A reader's handle on a cache of several regions. Threads: one.

    Raises:
        MooncakeError: a region cannot be reached, see ``Media.attach``.
    """

    def __init__(self, media: Media, parts: tuple[CachePart, ...], *, deadline_ns: int) -> None:
        ordered = sorted(parts, key=lambda part: part.offset)
        self._offsets = np.array([part.offset for part in ordered], np.uint64)
        self._ends = self._offsets + np.array([part.region.size_bytes for part in ordered], np.uint64)
        self._attachments = [media.attach(ordered[0].region, deadline_ns=deadline_ns)]
        try:
            for part in ordered[1:]:
                self._attachments.append(media.attach(part.region, deadline_ns=deadline_ns))
        except MooncakeError:
            self.close()
            raise

    @property
    def medium(self) -> str:
        """Return how the bytes move now."""
        return self._attachments[0].medium

    @property
    def reason(self) -> str:
        """Return why that medium was chosen."""
        return self._attachments[0].reason

    def read(self, batch: ReadBatch, *, deadline_ns: int) -> ReadResult:
        """Copy every request of the batch; offsets are the layout's. A request outside all regions fails the batch."""
        if len(self._attachments) == 1 and not self._offsets[0]:
            return self._attachments[0].read(batch, deadline_ns=deadline_ns)
        owners = np.searchsorted(self._offsets, batch.remote_offsets, side="right").astype(np.int64) - 1
        if owners.min() < 0 or (batch.remote_offsets + batch.lengths > self._ends[owners]).any():
            return ReadResult.failed(batch, RemoteProtocolError("a page lies outside the prefill worker's regions"))
        ok = np.zeros(len(batch.lengths), np.bool_)
        error: MooncakeError | None = None
        for owner in np.unique(owners).tolist():
            chosen = owners == owner
            part = ReadBatch(batch.remote_offsets[chosen] - self._offsets[owner], batch.local_addresses[chosen],
                             batch.lengths[chosen])
            result = self._attachments[owner].read(part, deadline_ns=deadline_ns)
            ok[chosen] = result.ok
            error = error or result.error
        return ReadResult.of(batch, ok, error)

    def close(self) -> None:
        """Release every region. Idempotent."""
        for attachment in self._attachments:
            attachment.close()
