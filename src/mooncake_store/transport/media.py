"""Hold all media of this process: serve our memory on each, read a peer's over the best one.

Users of ``Media`` decide nothing about media: they serve memory, publish the descriptor, attach to a peer's, read.
``select.choose`` picks; this shell attaches, and on failure passes on to the next medium, retrying only what failed.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from mooncake_store.errors import ChecksumMismatch, ConfigError, MooncakeError, PeerUnreachable, TransferFailed
from mooncake_store.metrics import Metrics
from mooncake_store.transport.base import (
    Attachment,
    LocalMemory,
    Offer,
    ReadBatch,
    ReadResult,
    RegionDescriptor,
    RegionGone,
    Transport,
)
from mooncake_store.transport.cma import CmaTransport
from mooncake_store.transport.loopback import LoopbackTransport
from mooncake_store.transport.memory import host_identity
from mooncake_store.transport.rdma.gids import ANY_INDEX
from mooncake_store.transport.rdma.transport import RdmaTransport
from mooncake_store.transport.rdma.verbs import VerbsBackend
from mooncake_store.transport.select import Choice, NoMedium, choose
from mooncake_store.transport.shm import ShmTransport
from mooncake_store.transport.tcp import TcpTransport
from mooncake_store.transport.tls import NO_TLS, TlsFiles, load_contexts
from mooncake_store.types import HostIdentity

logger = logging.getLogger(__name__)

COOL_DOWN_S = 30.0
COOLING_MAX = 4096
STALLED_S = 0.25
"""A read that had this long and got nothing stalled; less, and the caller's deadline was short."""
SMALL_READ_BYTES = 4096
"""Smaller reads, of epoch words, are counted with the next larger one: counting costs as much as reading."""


class ProbedTransport(Transport, Protocol):
    """A transport that can say whether this machine has what it needs."""

    def probe(self) -> str:
        """Return why the medium cannot work here, empty when it can."""
        ...


class TransportSettings(msgspec.Struct, frozen=True):
    """What the user may set about media: the address to bind; devices and GID index of rdma; certificates of tcp."""

    host: str = "127.0.0.1"
    rdma_devices: tuple[str, ...] = ()
    rdma_gid_index: int = ANY_INDEX
    tls: TlsFiles = NO_TLS


def _make_rdma(settings: TransportSettings) -> RdmaTransport:
    backend = VerbsBackend(device_names=settings.rdma_devices, gid_index=settings.rdma_gid_index)
    return RdmaTransport(settings.host, backend=backend)


TRANSPORTS: dict[str, Callable[[TransportSettings], ProbedTransport]] = {
    "shm": lambda settings: ShmTransport(),
    "cma": lambda settings: CmaTransport(),
    "rdma": _make_rdma,
    "tcp": lambda settings: TcpTransport(settings.host, tls=load_contexts(settings.tls)),
}
"""How to make each medium."""


class Media:
    """All media of this process.

    Args:
        allowed: names of media we may use, most wanted first: ``shm``, ``cma``, ``rdma``, ``tcp``.
        host: address that tcp and rdma bind and announce.
        metrics: gets bytes per medium and fallbacks.
        rdma_devices: RDMA devices to use; empty = those near this process.
        rdma_gid_index: entry of their address tables; -1 = chosen per peer.
        tls: certificates that tcp uses; empty = plain tcp.

    Threads: every method may be called from any thread.

    Raises:
        ConfigError: an unknown medium, none of them works on this machine, or a certificate cannot be used.
    """

    def __init__(self, *, allowed: Sequence[str], host: str = "127.0.0.1", metrics: Metrics,
                 rdma_devices: tuple[str, ...] = (), rdma_gid_index: int = ANY_INDEX,
                 tls: TlsFiles = NO_TLS) -> None:
        unknown = [medium for medium in allowed if medium not in TRANSPORTS]
        if unknown:
            raise ConfigError(f"unknown medium {', '.join(unknown)}", where="$.media",
                              hint=f"choose from {', '.join(TRANSPORTS)}")
        settings = TransportSettings(host, rdma_devices, rdma_gid_index, tls)
        made = {medium: TRANSPORTS[medium](settings) for medium in dict.fromkeys(allowed)}
        self._start(made, metrics, COOL_DOWN_S)

    @classmethod
    def of(cls, transports: dict[str, ProbedTransport], *, metrics: Metrics,
           cool_down_s: float = COOL_DOWN_S) -> Media:
        """Build from given transports, most wanted first: for tests, and to wrap one in ``faults.FaultyTransport``."""
        media = cls.__new__(cls)
        media._start(dict(transports), metrics, cool_down_s)
        return media

    def _start(self, made: dict[str, ProbedTransport], metrics: Metrics, cool_down_s: float) -> None:
        self._metrics = metrics
        self._cool_down_s = cool_down_s
        self._lock = threading.Lock()
        self._cooling: dict[int, dict[str, int]] = {}
        self._told: dict[tuple[int, str, bool], None] = {}
        self._attachments: weakref.WeakSet[MediaAttachment] = weakref.WeakSet()
        self._loopback = LoopbackTransport()
        self._transports: dict[str, Transport] = {}
        notes: list[str] = []
        for medium, transport in made.items():
            obstacle = transport.probe()
            notes.append(f"{medium} unusable ({obstacle})" if obstacle else f"{medium} usable")
            if obstacle:
                transport.close()
            else:
                self._transports[medium] = transport
        logger.info("media: %s", "; ".join(notes) or "none allowed")
        if not self._transports:
            raise ConfigError(f"no medium works on this machine: {'; '.join(notes) or 'none is allowed'}",
                              where="$.media", hint="allow tcp, which works everywhere")

    def identity(self) -> HostIdentity:
        """Return the host we are on."""
        return host_identity()

    def usable(self) -> tuple[str, ...]:
        """Return the media that work here, most wanted first."""
        return tuple(self._transports)

    def serve(self, memory: LocalMemory) -> RegionDescriptor:
        """Let peers read ``memory`` over every medium that can serve it, until ``withdraw``.

        ``memory.owner`` is kept alive that long. The descriptor is safe to publish.

        Raises:
            TransferFailed: no medium can serve such memory.
        """
        region_id = secrets.randbits(63) | 1  # never 0, which a guard word means "withdrawn" by
        offers: list[Offer] = []
        notes: list[str] = []
        for medium, transport in self._transports.items():
            if (medium == "cuda") != (memory.kind == "cuda"):
                continue
            try:
                offer = transport.serve(region_id, memory)
            except (MooncakeError, OSError) as error:
                notes.append(f"{medium}: {error}")
                continue
            if offer is None:
                notes.append(f"{medium}: cannot serve such memory")
            else:
                offers.append(offer)
        if not offers:
            raise TransferFailed(f"no medium can serve {memory.size_bytes} bytes ({'; '.join(notes)})",
                                 where="$.media", hint="allow cma or tcp, which serve any memory")
        if memory.kind == "host":
            self._loopback.serve(region_id, memory)
        logger.info("serving %d bytes as region %#x over %d media%s", memory.size_bytes, region_id, len(offers),
                    "".join(f"; {note}" for note in notes))
        return RegionDescriptor(region_id, memory.size_bytes, host_identity(), tuple(offers))

    def withdraw(self, region_id: int) -> None:
        """Stop serving a region: once this returns, no medium touches its memory on our side. Idempotent."""
        self._loopback.withdraw(region_id)
        for transport in self._transports.values():
            transport.withdraw(region_id)

    def attach(self, region: RegionDescriptor, *, deadline_ns: int) -> MediaAttachment:
        """Open a region over the best medium that reaches it; a region of our own is copied within the process.

        Raises:
            RegionGone: the owner's process is dead, or no longer serves the region.
            PeerUnreachable: no medium reaches it; the message has one reason per medium.
        """
        attachment = MediaAttachment(self, region, self._open(region, frozenset(), deadline_ns))
        with self._lock:
            self._attachments.add(attachment)
        return attachment

    def close(self) -> None:
        """Withdraw everything, close every attachment, stop threads. Idempotent."""
        with self._lock:
            attachments = list(self._attachments)
        for attachment in attachments:
            attachment.close()
        self._loopback.close()
        for transport in self._transports.values():
            transport.close()

    def _count(self, medium: str, num_bytes: int) -> None:
        if num_bytes:
            self._metrics.add("mooncake_pull_bytes_total", num_bytes, medium=medium)

    def _open(self, region: RegionDescriptor, tried: frozenset[str], deadline_ns: int) -> _Opened:
        """Attach over the best medium outside ``tried``; passes on from one that fails."""
        if self._loopback.lookup(region.region_id) is not None:
            return _Opened("loopback", "our own memory", self._loopback.attach(region, deadline_ns=deadline_ns))
        failures: dict[str, str] = {}
        while True:
            choice = self._choose(region, tried | failures.keys())
            if not isinstance(choice, Choice):
                reasons = "; ".join([*(f"{medium}: {why}" for medium, why in failures.items()), *choice.reasons])
                raise PeerUnreachable(f"no medium reaches region {region.region_id:#x}: {reasons}")
            try:
                inner = self._transports[choice.medium].attach(region, deadline_ns=deadline_ns)
            except RegionGone:
                raise
            except (PeerUnreachable, TransferFailed) as error:
                self._cool(region.region_id, choice.medium, error)
                failures[choice.medium] = error.message
                continue
            for medium in failures:
                self._count_fallback(medium, "attach")
            reason = "; ".join([choice.reason, *(f"{medium}: {why}" for medium, why in failures.items())])
            logger.log(self._level(logging.INFO, region.region_id, choice.medium), "reading region %#x over %s: %s",
                       region.region_id, choice.medium, reason)
            return _Opened(choice.medium, reason, inner)

    def _count_fallback(self, medium: str, reason: str) -> None:
        self._metrics.add("mooncake_pull_fallbacks_total", medium=medium, reason=reason)

    def _level(self, level: int, region_id: int, medium: str) -> int:
        """Return ``level`` the first time for a region and medium, DEBUG afterwards: metrics count, logs tell."""
        key = (region_id, medium, level == logging.WARNING)
        with self._lock:
            if key in self._told:
                return logging.DEBUG
            if len(self._told) >= COOLING_MAX:
                del self._told[next(iter(self._told))]  # the oldest; it may be told twice
            self._told[key] = None
        return level

    def _choose(self, region: RegionDescriptor, tried: frozenset[str]) -> Choice | NoMedium:
        cooling = frozenset(medium for medium, until_ns in self._cooling_of(region.region_id).items()
                            if until_ns > time.monotonic_ns())
        own, allowed = host_identity(), tuple(self._transports)
        choice = choose(own, region, allowed, cooling | tried)
        # a medium that failed a moment ago is still better than none
        return choice if isinstance(choice, Choice) or cooling <= tried else choose(own, region, allowed, tried)

    def _cooling_of(self, region_id: int) -> dict[str, int]:
        with self._lock:
            return dict(self._cooling.get(region_id, {}))

    def _cool(self, region_id: int, medium: str, error: MooncakeError) -> None:
        logger.log(self._level(logging.WARNING, region_id, medium),
                   "%s failed for region %#x, not used for it for %g s: %s", medium, region_id, self._cool_down_s,
                   error)
        now_ns = time.monotonic_ns()
        with self._lock:
            if region_id not in self._cooling and len(self._cooling) >= COOLING_MAX:
                del self._cooling[next(iter(self._cooling))]  # the oldest; it may be tried once too early
            self._cooling.setdefault(region_id, {})[medium] = now_ns + int(self._cool_down_s * 1e9)


class _Opened(NamedTuple):
    medium: str
    reason: str
    inner: Attachment


def _reason(error: MooncakeError) -> str:
    if isinstance(error, ChecksumMismatch):
        return "changed"
    return "unreachable" if isinstance(error, PeerUnreachable) else "failed"


class MediaAttachment:
    """Reads one region; passes to the next medium when one fails. Implements ``base.Attachment``.

    Attributes:
        medium: in use now.
        reason: why that one; one line.

    Threads: one reads at a time; ``close`` may come from another.
    """

    def __init__(self, media: Media, region: RegionDescriptor, opened: _Opened) -> None:
        self.region = region
        self._media = media
        self._lock = threading.Lock()
        self._is_closed = False
        self._inner: Attachment | None = None
        self._return_at_ns = 0
        self._uncounted_bytes = 0
        self._use(opened)

    def read(self, batch: ReadBatch, *, deadline_ns: int) -> ReadResult:
        """Copy the batch; see ``base.Attachment.read``. Requests that one medium fails are asked of the next."""
        started_ns = time.monotonic_ns()
        if self._inner is None or (self._return_at_ns and started_ns >= self._return_at_ns):
            self._reopen(deadline_ns)
        inner = self._inner
        if inner is None:
            batch.check(self.region.size_bytes)
            return ReadResult.failed(batch, self._unusable)
        result = inner.read(batch, deadline_ns=deadline_ns)
        if result.num_bytes < SMALL_READ_BYTES:
            self._uncounted_bytes += result.num_bytes
        else:
            self._media._count(self.medium, result.num_bytes + self._uncounted_bytes)
            self._uncounted_bytes = 0
        if result.error is None:
            return result
        return self._retry(batch, result, started_ns, deadline_ns)

    def close(self) -> None:
        """Release the region. Idempotent."""
        with self._lock:
            self._is_closed = True
            inner, self._inner = self._inner, None
            self._unusable: MooncakeError = TransferFailed("attachment is closed")
        if inner is not None:
            inner.close()
            self._media._count(self.medium, self._uncounted_bytes)

    def _retry(self, batch: ReadBatch, result: ReadResult, started_ns: int, deadline_ns: int) -> ReadResult:
        ok = result.ok.copy()
        num_bytes, error = result.num_bytes, result.error
        tried: frozenset[str] = frozenset()
        while error is not None:
            failed, now_ns = self.medium, time.monotonic_ns()
            if self._is_closed or isinstance(error, RegionGone):
                break
            if now_ns >= deadline_ns:
                if num_bytes == 0 and now_ns - started_ns >= STALLED_S * 1e9:
                    self._leave(error)
                break
            tried |= {failed}
            self._media._cool(self.region.region_id, failed, error)
            try:
                self._use(self._media._open(self.region, tried, deadline_ns))
            except PeerUnreachable:
                self._drop(error)  # nothing left to try; the next read starts over
                break
            self._media._count_fallback(failed, _reason(error))
            inner, rest = self._inner, np.flatnonzero(~ok)
            if inner is None:
                break
            started_ns = time.monotonic_ns()
            part = inner.read(ReadBatch(batch.remote_offsets[rest], batch.local_addresses[rest], batch.lengths[rest],
                                        batch.is_verified_later), deadline_ns=deadline_ns)
            self._media._count(self.medium, part.num_bytes)
            ok[rest] = part.ok
            num_bytes, error = part.num_bytes, part.error
        return ReadResult.of(batch, ok, error)

    def _leave(self, error: MooncakeError) -> None:
        """Give up a medium that used the time up and moved nothing; the next read starts over without it."""
        self._media._cool(self.region.region_id, self.medium, error)
        if isinstance(self._media._choose(self.region, frozenset({self.medium})), Choice):
            self._media._count_fallback(self.medium, "stalled")
        self._drop(error)

    def _reopen(self, deadline_ns: int) -> None:
        """Start over with the best medium: a cool-down has ended, or nothing worked last time."""
        if self._is_closed:
            return
        try:
            self._use(self._media._open(self.region, frozenset(), deadline_ns))
        except PeerUnreachable as error:
            self._return_at_ns = 0
            if self._inner is None:
                self._unusable = error

    def _use(self, opened: _Opened) -> None:
        with self._lock:
            old, self._inner = self._inner, None if self._is_closed else opened.inner
            self.medium, self.reason = opened.medium, opened.reason
            cooling = self._media._cooling_of(self.region.region_id)
            self._return_at_ns = min((until for medium, until in cooling.items() if medium != opened.medium), default=0)
            is_late = self._is_closed
        if old is not None:
            old.close()
        if is_late:
            opened.inner.close()

    def _drop(self, error: MooncakeError) -> None:
        with self._lock:
            old, self._inner = self._inner, None
            if not self._is_closed:
                self._unusable = error
        if old is not None:
            old.close()
