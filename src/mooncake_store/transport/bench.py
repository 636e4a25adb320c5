"""Time media against one memcpy of the same bytes, between two real processes.

The owner process serves the same bytes over every medium; this process reads them. All media and the memcpy take turns
within each repetition, so that whatever disturbs the machine disturbs all alike. Every first read is compared byte by
byte. Threading model: the caller's thread, and one per reader where a case asks for several.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from mooncake_store.errors import LocalProtocolError, MooncakeError, TransferFailed
from mooncake_store.transport.base import Attachment, LocalMemory, ReadBatch, RegionDescriptor, Transport
from mooncake_store.transport.media import TRANSPORTS, TransportSettings
from mooncake_store.transport.memory import host_identity, map_memfd, populate

START_TIMEOUT_S = 60.0
READ_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
SHORT_BYTES = 1 << 20
"""A case of at most this is read ``SHORT_READS`` times per repetition."""
SHORT_READS = 20
SEED = 20
MIB = 1 << 20


class Case(NamedTuple):
    """What is read: ``total_bytes`` as blocks of ``block_bytes``, from random places to random places if scattered."""

    total_bytes: int
    block_bytes: int
    is_scattered: bool = True
    num_threads: int = 1

    def batches(self, target_address: int) -> list[ReadBatch]:
        """Return one batch per thread; together they read every block once."""
        count = self.total_bytes // self.block_bytes
        source, target = (np.random.default_rng(seed).permutation(count) if self.is_scattered else np.arange(count)
                          for seed in (1, 2))
        size = np.uint64(self.block_bytes)
        offsets, addresses = source.astype(np.uint64) * size, target.astype(np.uint64) * size
        addresses += np.uint64(target_address)
        lanes = [slice(lane, None, self.num_threads) for lane in range(self.num_threads)]
        return [ReadBatch(np.ascontiguousarray(offsets[lane]), np.ascontiguousarray(addresses[lane]),
                          np.full(len(offsets[lane]), size)) for lane in lanes]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What one medium did in one case; times are medians, ``ratio`` is to one memcpy of the same bytes.

    ``note`` says why there are no figures.
    """

    medium: str
    total_bytes: int
    block_bytes: int
    is_scattered: bool
    num_threads: int
    num_reads: int = 0
    seconds: float = 0.0
    p99_s: float = 0.0
    memcpy_s: float = 0.0
    ratio: float = 0.0
    note: str = ""


def measure(media: Sequence[str], cases: Sequence[Case], *, num_reps: int,
            settings: TransportSettings | None = None) -> Iterator[list[Row]]:
    """Yield the rows of each case, one per medium, as soon as it is done.

    Args:
        media: names, keys of ``media.TRANSPORTS``; one that does not work here gets a row that says why.
        cases: what to read.
        num_reps: repetitions of each case.
        settings: address and devices to use.

    Raises:
        MooncakeError: the owner process cannot start, or wrong bytes arrived.
    """
    settings = settings or TransportSettings()
    size = max(case.total_bytes for case in cases)
    target = np.empty(size, np.uint8)
    populate(target.ctypes.data, size)
    source = _content(size)
    with Owner(media, settings, size) as owner:
        for case in cases:
            yield _measure_case(owner, media, case, num_reps, source, target)


class _Reader:
    """Reads one case over one medium."""

    def __init__(self, owner: Owner, medium: str, case: Case, target_address: int) -> None:
        self.medium = medium
        self.times_s: list[float] = []
        self._batches = case.batches(target_address)
        self._attachments = [owner.attach(medium) for _ in self._batches]

    def read(self) -> float:
        """Read everything once and return the seconds. Raises MooncakeError."""
        deadline_ns = time.monotonic_ns() + int(READ_TIMEOUT_S * 1e9)
        errors: list[MooncakeError] = []

        def work(attachment: Attachment, batch: ReadBatch) -> None:
            result = attachment.read(batch, deadline_ns=deadline_ns)
            if result.error is not None:
                errors.append(result.error)

        jobs = list(zip(self._attachments, self._batches, strict=True))
        threads = [threading.Thread(target=work, args=job) for job in jobs[1:]]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        work(*jobs[0])
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - started
        if errors:
            raise errors[0]
        return seconds

    def close(self) -> None:
        for attachment in self._attachments:
            attachment.close()


def _measure_case(owner: Owner, media: Sequence[str], case: Case, num_reps: int, source: npt.NDArray[np.uint8],
                  target: npt.NDArray[np.uint8]) -> list[Row]:
    size = case.total_bytes
    address, source_address = target.ctypes.data, source.ctypes.data
    readers: list[_Reader] = []
    notes: dict[str, str] = {}
    try:
        for medium in media:
            try:
                reader = _Reader(owner, medium, case, address)
                readers.append(reader)
                target[:size] = 0
                reader.read()
            except MooncakeError as error:
                notes[medium] = str(error)
                continue
            _check(case, medium, source, target)
        memcpy_s: list[float] = []
        for _ in range(num_reps):
            for _ in range(SHORT_READS if size <= SHORT_BYTES else 1):
                started = time.perf_counter()
                ctypes.memmove(address, source_address, size)
                memcpy_s.append(time.perf_counter() - started)
                for reader in readers:
                    if reader.medium not in notes:
                        reader.times_s.append(reader.read())
    finally:
        for reader in readers:
            reader.close()
    times = {reader.medium: reader.times_s for reader in readers}
    return [_row(medium, case, times.get(medium, []), memcpy_s, notes.get(medium, "")) for medium in media]


def _row(medium: str, case: Case, times_s: Sequence[float], memcpy_s: Sequence[float], note: str) -> Row:
    fields = {"medium": medium, **case._asdict()}
    if note:
        return msgspec.convert({**fields, "note": note}, Row)
    seconds, copy_s = statistics.median(times_s), statistics.median(memcpy_s)
    p99_s = sorted(times_s)[min(len(times_s) - 1, int(len(times_s) * 0.99))]
    return msgspec.convert({**fields, "num_reads": len(times_s), "seconds": seconds, "p99_s": p99_s,
                            "memcpy_s": copy_s, "ratio": seconds / copy_s}, Row)


def _check(case: Case, medium: str, source: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8]) -> None:
    size = case.block_bytes
    for batch in case.batches(0):
        for offset, place in zip(batch.remote_offsets.tolist(), batch.local_addresses.tolist(), strict=True):
            if not np.array_equal(source[offset:offset + size], target[place:place + size]):
                raise TransferFailed(f"wrong bytes arrived in the block at {offset}", where=medium)


class Owner:
    """The process that has the bytes. Use as a context manager; it is gone afterwards, however this one ends."""

    def __init__(self, media: Sequence[str], settings: TransportSettings, size_bytes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._link, child = context.Pipe()
        self._process = context.Process(target=_own, args=(child, tuple(media), settings, size_bytes), daemon=True,
                                        name="mooncake-bench-owner")
        self._process.start()
        child.close()
        self._transports: dict[str, Transport] = {}
        self._settings = settings
        self._regions: dict[str, RegionDescriptor] = {}
        self._obstacles: dict[str, str] = {}
        try:
            if not self._link.poll(START_TIMEOUT_S):
                raise TransferFailed(f"the owner process said nothing for {START_TIMEOUT_S:g} s", where="benchmark")
            self._regions, self._obstacles = msgspec.msgpack.decode(
                self._link.recv_bytes(), type=tuple[dict[str, RegionDescriptor], dict[str, str]])
        except (MooncakeError, EOFError, OSError) as error:
            self.close()
            if isinstance(error, MooncakeError):
                raise
            raise TransferFailed(f"the owner process ended: {error}", where="benchmark",
                                 hint="there may be too little memory; try smaller sizes") from error

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, by force if it does not go in time."""
        for transport in self._transports.values():
            transport.close()
        self._link.close()  # the owner sees the end and goes
        self._process.join(STOP_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(STOP_TIMEOUT_S)

    def attach(self, medium: str, transport: Transport | None = None) -> Attachment:
        """Open the region, with a transport of the caller's if given.

        Raises:
            MooncakeError: also when the medium does not work here.
        """
        if medium not in self._regions:
            raise TransferFailed(self._obstacles.get(medium, "the owner does not serve it"), where=medium)
        if transport is None:
            if medium not in self._transports:
                self._transports[medium] = TRANSPORTS[medium](self._settings)
            transport = self._transports[medium]
        deadline_ns = time.monotonic_ns() + int(START_TIMEOUT_S * 1e9)
        return transport.attach(self._regions[medium], deadline_ns=deadline_ns)


def _own(link: Connection, media: tuple[str, ...], settings: TransportSettings, size_bytes: int) -> None:
    """Serve the bytes until the other end of ``link`` is closed; the body of the owner process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the reader then closes the link
    shared = map_memfd(size_bytes, "mooncake-bench")
    shared.array()[:] = _content(size_bytes)
    private = _content(size_bytes)  # what cma is for: an engine's own memory
    regions: dict[str, RegionDescriptor] = {}
    obstacles: dict[str, str] = {}
    transports = {medium: TRANSPORTS[medium](settings) for medium in media}
    try:
        for number, (medium, transport) in enumerate(transports.items(), 1):
            memory = (LocalMemory(private.ctypes.data, size_bytes, owner=private) if medium == "cma"
                      else shared.memory())
            obstacle = transport.probe()
            try:
                offer = None if obstacle else transport.serve(number, memory)
            except (MooncakeError, OSError) as error:
                offer, obstacle = None, str(error)
            if offer is None:
                obstacles[medium] = obstacle or "it cannot serve such memory"
            else:
                regions[medium] = RegionDescriptor(number, size_bytes, host_identity(), (offer,))
        link.send_bytes(msgspec.msgpack.encode((regions, obstacles)))
        try:
            link.recv_bytes()
        except EOFError:
            pass  # the reader is done
    finally:
        for transport in transports.values():
            transport.close()
        shared.close()


def _content(size_bytes: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(SEED).integers(0, 256, size_bytes, np.uint8)


def check_case(case: Case) -> None:
    """Raise LocalProtocolError unless the case can be read as it says."""
    if not 0 < case.block_bytes <= case.total_bytes or case.total_bytes % case.block_bytes:
        raise LocalProtocolError(f"{case.total_bytes} bytes cannot be read in blocks of {case.block_bytes}")
    if not 0 < case.num_threads <= case.total_bytes // case.block_bytes:
        raise LocalProtocolError(f"{case.num_threads} threads for {case.total_bytes // case.block_bytes} blocks")
