"""Put blocks into the pool and get them from whoever has them.

Architecture::

    StoreClient      this module: what engines and nodes call
      ├─ Segment     pool/segment.py    our share of the pool
      ├─ PullServer  pull/server.py     peers read our share (one thread)
      ├─ Puller      pull/puller.py     we read theirs (in the caller's thread)
      ├─ Replicator  pull/replication.py  we ask capacity nodes to keep copies (one thread)
      ├─ Directory   directory/         who has what
      └─ Media       transport/media.py how bytes move

Threading model: every method may be called from any thread. Failure model: a full pool, a dead peer or a dead directory
is an outcome; only wrong arguments raise.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence

from mooncake_store import __version__
from mooncake_store.config import StoreConfig
from mooncake_store.directory.base import Directory
from mooncake_store.directory.open import open_directory
from mooncake_store.errors import LocalProtocolError, MooncakeError
from mooncake_store.image import merge_adjacent, scatter
from mooncake_store.metrics import Metrics
from mooncake_store.pool.index import StoredBlock
from mooncake_store.pool.segment import Segment
from mooncake_store.pull.base import GetOutcome, PeerAddress, Runs, Scatter
from mooncake_store.pull.puller import Puller
from mooncake_store.pull.replication import Replicator, ReplicatorHooks
from mooncake_store.pull.server import OfferAnswer, PullServer, ServerHooks
from mooncake_store.pull.wire import FETCH_MAX_BYTES, TEXT_MAX_CHARS, Hello, Offer, Welcome
from mooncake_store.transport.base import RegionDescriptor
from mooncake_store.transport.media import Media
from mooncake_store.transport.memory import map_memfd
from mooncake_store.transport.tls import TlsFiles
from mooncake_store.types import BlockKey, Member, NodeId

__all__ = ["GetOutcome", "Scatter", "StoreClient"]

logger = logging.getLogger(__name__)

ANNOUNCE_BLOCKS_MAX = 64


class StoreClient:
    """One process's part in the pool.

    Args:
        config: settings.
        kind: what to announce ourselves as: ``engine`` or ``store``.
        about: what to tell others of our kind in the announcement.
        directory: where blocks are; None opens what ``config`` names. A given one must not have joined yet and is left
            for the caller to close.
        media: how bytes move; None opens what ``config`` allows. A given one is left for the caller to close.
        metrics: where to count; None makes its own.
        on_offer: takes offers of other members' blocks, from the server's thread; None refuses them.

    Raises:
        ConfigError: an unusable setting.
        CapacityExceeded: the machine has no memory for the segment.
        PeerUnreachable: ``config.host`` cannot be bound.
    """

    def __init__(self, config: StoreConfig, *, kind: str = "engine", about: str = "",
                 directory: Directory | None = None, media: Media | None = None, metrics: Metrics | None = None,
                 on_offer: Callable[[Offer], OfferAnswer] | None = None) -> None:
        self.config = config
        self.kind = kind
        self.node_id = NodeId(_node_name(kind))
        self.metrics = metrics if metrics is not None else Metrics()
        self._is_closed = False
        self._closing = threading.Lock()
        self._announcing = threading.Lock()
        self._closers: list[Callable[[], object]] = []  # run last to first
        try:
            self.media = media if media is not None else self._open_media()
            self._segment = self._open_segment()
            region = self._serve_segment()
            host = self.media.identity()
            fetch_max_bytes = 0 if config.tls_cert else FETCH_MAX_BYTES  # nothing encrypts what is fetched
            self._server = PullServer(
                host=config.host, welcome=Welcome(0, self.node_id, host, __version__, region),
                source=self._segment, lease_max_ms=max(1, int(config.lease_s * 1000)),
                fetch_max_bytes=fetch_max_bytes, metrics=self.metrics,
                hooks=ServerHooks(on_offer, self._on_dropped, self._describe))
            self._closers.append(self._server.close)
            self.directory = directory if directory is not None else open_directory(config, self.metrics)
            self._closers.append(self.directory.close if directory is None else self._withdraw_all)
            own = PeerAddress(self.node_id, self._server.address, host)
            self._puller = Puller(hello=Hello(0, self.node_id, host, __version__), cell=self.directory,
                                  media=self.media, config=config, fetch_max_bytes=fetch_max_bytes,
                                  metrics=self.metrics)
            self._closers.append(self._puller.close)
            self._replicator = Replicator(own=own, cell=self.directory, metrics=self.metrics,
                                          hooks=ReplicatorHooks(self._segment.lengths, self._tick))
            self._closers.append(self._replicator.close)
            self._server.start()
            self._replicator.start()
            self.directory.join(Member(self.node_id, kind, own.control, host, os.getpid(), self._segment.size_bytes,
                                       __version__, about))
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """Return where our control socket answers, e.g. for ``query_status``."""
        return self._server.address

    def has(self, key: BlockKey) -> bool:
        """Tell whether the block is in our own segment."""
        return key in self._segment

    def put(self, keys: Sequence[BlockKey], sources: Sequence[Scatter]) -> list[bool]:
        """Copy blocks into our segment, making room as needed, and announce them.

        Blocks of one call do not push each other out; when they are more than the segment, the first ones stay.

        Args:
            keys: in chain order where there is one: the last leave first.
            sources: each block's pieces; must stay mapped and unchanged until this returns.

        Returns:
            For each key whether its block is in our segment now, whoever put it there.

        Raises:
            LocalProtocolError: keys and sources do not match.
        """
        runs = _runs(keys, sources)
        is_here = [False] * len(keys)
        if self._is_closed:
            self._count("mooncake_put_blocks_total", ["closed"] * len(keys))
            return is_here
        kept: list[StoredBlock] = []
        try:
            for start in range(0, len(keys), ANNOUNCE_BLOCKS_MAX):
                end = min(start + ANNOUNCE_BLOCKS_MAX, len(keys))
                is_here[start:end] = self._put_some(keys[start:end], runs[start:end], kept)
        finally:
            self._segment.unpin(kept)
        return is_here

    def match(self, keys: Sequence[BlockKey]) -> int:
        """Return how many leading keys have a replica somewhere, by the local view; no I/O."""
        return self.directory.match(keys)

    def get(self, keys: Sequence[BlockKey], targets: Sequence[Scatter], *, deadline_ns: int) -> list[GetOutcome]:
        """Copy blocks from wherever they are; blocks until done or past the deadline.

        Args:
            keys: blocks wanted.
            targets: where each goes; must stay mapped until this returns. Undefined unless the outcome is ``ok``.
            deadline_ns: CLOCK_MONOTONIC; ``pull_timeout_s`` bounds it further.

        Returns:
            One outcome per key, in order.

        Raises:
            LocalProtocolError: keys and targets do not match.
        """
        runs = _runs(keys, targets)
        if self._is_closed:
            return [GetOutcome("failed", "", 0, "the store is closed")] * len(keys)
        outcomes = self._get_own(keys, runs)
        rest = [position for position, outcome in enumerate(outcomes) if outcome is None]
        if rest:
            pulled = self._pull([keys[position] for position in rest], [runs[position] for position in rest],
                                deadline_ns)
            for position, outcome in zip(rest, pulled, strict=True):
                outcomes[position] = outcome
        settled = [outcome for outcome in outcomes if outcome is not None]
        self._count("mooncake_pull_blocks_total", [outcome.result for outcome in settled])
        return settled

    def adopt(self, keys: Sequence[BlockKey], lengths: Sequence[int], source: PeerAddress, *,
              deadline_ns: int) -> int:
        """Pull blocks from ``source`` into our own segment and announce them; returns how many arrived.

        Used by capacity nodes: the source has just offered them, so the directory need not know yet.
        """
        if self._is_closed:
            return 0
        reserved: list[StoredBlock] = []
        adopted: list[StoredBlock] = []
        gone: list[BlockKey] = []
        try:
            for key, length in zip(keys, lengths, strict=True):
                room = self._segment.reserve(key, length)
                gone.extend(room.evicted)
                if room.block is not None:
                    reserved.append(room.block)
            targets = [[(self._segment.address_of(block), block.extent.length)] for block in reserved]
            wanted = [block.key for block in reserved]
            results = self._puller.pull(wanted, targets, deadline_ns=deadline_ns, source=source)
            for block, pulled in zip(list(reserved), results, strict=True):
                self._count("mooncake_pull_blocks_total", [pulled.outcome.result])
                if pulled.outcome.result == "ok":
                    self._segment.commit(block, pulled.checksum)
                    reserved.remove(block)
                    adopted.append(block)
        finally:
            for block in reserved:
                self._segment.revoke(block)
            self._segment.unpin(adopted)
        self._announce([block.key for block in adopted], gone)
        return len(adopted)

    def replicate(self, keys: Sequence[BlockKey]) -> None:
        """Offer blocks of our segment to capacity nodes, in the background; never blocks."""
        if not self._is_closed:
            self._replicator.offer(keys)

    def wait_replicated(self, timeout_s: float) -> bool:
        """Wait until everything passed to ``replicate`` has been offered; False on timeout."""
        deadline = time.monotonic() + timeout_s
        while not self._replicator.is_idle():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
        return True

    def status(self) -> dict[str, float]:
        """Return every metric sample by name."""
        self._segment.report()
        return self.metrics.snapshot()

    def close(self) -> None:
        """Leave the cell and give everything back, within some seconds. Idempotent; running calls end as failed."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
        for close in reversed(self._closers):
            try:
                close()
            except (MooncakeError, OSError):
                logger.exception("while closing %s", self.node_id)

    def _open_media(self) -> Media:
        media = Media(allowed=self.config.media, host=self.config.host, metrics=self.metrics,
                      rdma_devices=self.config.rdma_devices, rdma_gid_index=self.config.rdma_gid_index,
                      tls=TlsFiles(self.config.tls_cert, self.config.tls_key, self.config.tls_ca))
        self._closers.append(media.close)
        return media

    def _open_segment(self) -> Segment:
        memory = map_memfd(self.config.segment_bytes, "mooncake-segment") if self.config.segment_bytes else None
        segment = Segment(memory, metrics=self.metrics)
        self._closers.append(segment.close)
        return segment

    def _serve_segment(self) -> RegionDescriptor | None:
        memory = self._segment.memory
        if memory is None:
            return None
        region = self.media.serve(memory)
        self._closers.append(lambda: self.media.withdraw(region.region_id))
        return region

    def _withdraw_all(self) -> None:
        self.directory.withdraw(self._segment.keys())

    def _put_some(self, keys: Sequence[BlockKey], runs: Sequence[Runs], kept: list[StoredBlock]) -> list[bool]:
        is_here: list[bool] = []
        results: list[str] = []
        fresh: list[BlockKey] = []
        gone: list[BlockKey] = []
        for key, run in zip(keys, runs, strict=True):
            stored = self._segment.store(key, run)
            gone.extend(stored.evicted)
            results.append(stored.result)
            is_here.append(stored.result in ("stored", "duplicate"))
            if stored.block is not None:
                kept.append(stored.block)
                fresh.append(key)
        self._announce(fresh, gone)
        self._count("mooncake_put_blocks_total", results)
        return is_here

    def _get_own(self, keys: Sequence[BlockKey], runs: Sequence[Runs]) -> list[GetOutcome | None]:
        """Copy what our own segment holds; None for the rest."""
        blocks = self._segment.pin(keys)
        if not any(blocks):
            return [None] * len(keys)
        outcomes: list[GetOutcome | None] = []
        try:
            for block, run in zip(blocks, runs, strict=True):
                num_bytes = sum(length for _, length in run)
                if block is None:
                    outcomes.append(None)
                elif block.extent.length != num_bytes:
                    reason = f"the block has {block.extent.length} bytes, the target {num_bytes}"
                    outcomes.append(GetOutcome("failed", "", 0, reason))
                else:
                    scatter(self._segment.address_of(block), run)
                    outcomes.append(GetOutcome("ok", "local", num_bytes, ""))
        finally:
            self._segment.unpin([block for block in blocks if block is not None])
        return outcomes

    def _pull(self, keys: Sequence[BlockKey], targets: Sequence[Runs], deadline_ns: int) -> list[GetOutcome]:
        started = time.monotonic()
        try:
            outcomes = [pulled.outcome for pulled in self._puller.pull(keys, targets, deadline_ns=deadline_ns)]
        except Exception:  # the engine's border: losing a block must never lose a request
            logger.exception("a pull of %d blocks failed", len(keys))
            self.metrics.add("mooncake_protocol_errors_total", reason="internal")
            return [GetOutcome("failed", "", 0, "internal error, see the log")] * len(keys)
        for medium in {outcome.medium for outcome in outcomes if outcome.result == "ok"}:
            self.metrics.observe("mooncake_pull_duration_seconds", time.monotonic() - started, medium=medium)
        return outcomes

    def _announce(self, fresh: Sequence[BlockKey], gone: Sequence[BlockKey]) -> None:
        """Tell the directory what changed, as things are *now*.

        Another thread may have evicted what we stored, or stored again what we evicted. Whoever announces last has seen
        the later state, because looking and telling happen under one lock.
        """
        if not fresh and not gone:
            return
        with self._announcing:
            keys = list(dict.fromkeys([*fresh, *gone]))
            held = self._segment.held(keys)
            self.directory.withdraw([key for key, is_held in zip(keys, held, strict=True) if not is_held])
            self.directory.publish([key for key, is_held in zip(keys, held, strict=True) if is_held])

    def _on_dropped(self, key: BlockKey) -> None:
        self._announce((), (key,))

    def _tick(self) -> None:
        self._puller.sweep()
        self._segment.report()

    def _describe(self) -> tuple[dict[str, float], dict[str, str]]:
        health = self.directory.health()
        info = {"node_id": self.node_id, "kind": self.kind, "version": __version__, "pid": str(os.getpid()),
                "cell": self.config.cell, "directory": self.config.directory, "control": self._server.address,
                "media": ",".join(self.media.usable()), "directory_error": health.error[:TEXT_MAX_CHARS]}
        return self.status(), info

    def _count(self, metric: str, results: Sequence[str]) -> None:
        for result in set(results):
            self.metrics.add(metric, results.count(result), result=result)


def _runs(keys: Sequence[BlockKey], pieces: Sequence[Scatter]) -> list[Runs]:
    if len(keys) != len(pieces):
        raise LocalProtocolError(f"{len(keys)} keys with {len(pieces)} scatters")
    runs: list[Runs] = []
    for scatter_ in pieces:
        if len(scatter_.addresses) != len(scatter_.lengths):
            raise LocalProtocolError(f"{len(scatter_.addresses)} addresses with {len(scatter_.lengths)} lengths")
        run = merge_adjacent(scatter_.addresses.tolist(), scatter_.lengths.tolist())
        if not run:
            raise LocalProtocolError("a scatter without bytes")
        runs.append(run)
    return runs


def _node_name(kind: str) -> str:
    host = re.sub(r"[^A-Za-z0-9.-]", "-", platform.node())[:32] or "host"
    return f"{kind}-{host}-{os.getpid()}-{secrets.token_hex(4)}"
