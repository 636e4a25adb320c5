"""Stand in for RDMA devices on a machine without any: reads across processes, refusals and flushes as real ones do.

The "device" is process_vm_readv(2). A process keeps a page of keys and queue pair numbers; a GID names the process and
the page's address, so a reader's device checks keys, bounds and connections there, and the owner's code takes no part.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections import deque

import numpy as np
import numpy.typing as npt

from mooncake_store.errors import TransferFailed
from mooncake_store.transport import libc
from mooncake_store.transport.copying import single_range
from mooncake_store.transport.rdma.backend import Completion, Queue, Reads, Route, Status
from mooncake_store.transport.rdma.gids import Gid
from mooncake_store.transport.rdma.rails import NUMA_UNKNOWN, Rail

KEYS_MAX = 64
NUMBERS_MAX = 256
_PREFIX = b"\xfd\x4d"


class _Page:
    """What other processes look up here: rows (key, address, size), and the numbers of connected queue pairs."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.words = np.zeros(3 * KEYS_MAX + NUMBERS_MAX, np.uint64)
        self.keys = self.words[:3 * KEYS_MAX].reshape(KEYS_MAX, 3)
        self.numbers = self.words[3 * KEYS_MAX:]

    def gid(self, position: int) -> bytes:
        address = int(self.words.ctypes.data)
        return _PREFIX + position.to_bytes(1, "big") + os.getpid().to_bytes(5, "big") + address.to_bytes(8, "big")


class _RemotePage:
    """Another process's page, as a device sees it."""

    def __init__(self, gid: bytes) -> None:
        self._pid = int.from_bytes(gid[3:8], "big")
        self._address = int.from_bytes(gid[8:], "big")
        self._words = np.zeros(3 * KEYS_MAX + NUMBERS_MAX, np.uint64)

    def read(self, number: int, rkey: int, remote: int, local: int, length: int) -> Status:
        """Do one read."""
        try:
            libc.read_process(self._pid, single_range(self._words.ctypes.data, self._words.nbytes),
                              single_range(self._address, self._words.nbytes))
            if number not in self._words[3 * KEYS_MAX:]:
                return Status.RETRIES
            rows = self._words[:3 * KEYS_MAX].reshape(KEYS_MAX, 3)
            found = rows[rows[:, 0] == rkey]
            if len(found) == 0 or remote < found[0, 1] or remote + length > int(found[0, 1]) + int(found[0, 2]):
                return Status.REMOTE_ACCESS
            copied = libc.read_process(self._pid, single_range(local, length), single_range(remote, length))
        except OSError:
            return Status.RETRIES
        return Status.OK if copied == length else Status.REMOTE_ACCESS


class FakeVerbs:
    """Implements ``rdma.backend.Backend``.

    Args:
        num_rails: ports.
        hang_after: this many reads are answered, later ones never; -1 = all are.
        memlock_bytes: more cannot be registered in all.
        repeats: report completions a second time at the next post, as a device may after a retry.
    """

    def __init__(self, *, num_rails: int = 2, hang_after: int = -1, memlock_bytes: int = 1 << 40,
                 repeats: bool = False) -> None:
        libc.allow_any_tracer()
        self.page = _Page()
        self.hang_after = hang_after
        self.memlock_bytes = memlock_bytes
        self.repeats = repeats
        self.pinned_bytes = 0
        self.num_reads = 0
        self.num_open_queue_sets = 0
        self._rails = [Rail(f"fake{i}", 1, "ethernet", NUMA_UNKNOWN, "", 100.0, 0,
                            (Gid(0, "roce2", self.page.gid(i)),)) for i in range(num_rails)]

    def probe(self) -> str:
        """Works wherever a process may read another."""
        return ""

    def rails(self) -> list[Rail]:
        """Return the ports."""
        return self._rails

    def open(self, rail: Rail) -> FakeDevice:
        """Open a port."""
        return FakeDevice(self, rail)

    def is_routed(self, own: Gid, peer: Gid) -> bool:
        """Say that port i reaches port i and no other, as with one switch per rail."""
        return own.raw[2] == peer.raw[2]


class FakeDevice:
    """Implements ``rdma.backend.Device``."""

    mtu = 5
    reads_max = 16

    def __init__(self, backend: FakeVerbs, rail: Rail) -> None:
        self.rail = rail
        self._backend = backend

    def register(self, address: int, size_bytes: int, *, is_target: bool) -> FakeRegistration:
        """Put the memory on the page of keys."""
        backend = self._backend
        with backend.page.lock:
            free = np.flatnonzero(backend.page.keys[:, 0] == 0)
            if len(free) == 0 or backend.pinned_bytes + size_bytes > backend.memlock_bytes:
                raise TransferFailed(f"cannot pin {size_bytes} bytes", where="rdma", hint="ulimit -l unlimited")
            backend.pinned_bytes += size_bytes
            row = int(free[0])
            key = secrets.randbits(31) | 1
            backend.page.keys[row, 1:] = address, size_bytes
            backend.page.keys[row, 0] = key
        return FakeRegistration(backend, row, key, size_bytes)

    def open_queues(self, count: int, *, is_reader: bool) -> FakeQueues:
        """Make queue pairs."""
        return FakeQueues(self._backend, count)

    def close(self) -> None:
        """Do nothing: there is nothing to close."""


class FakeRegistration:
    """Implements ``rdma.backend.Registration``."""

    def __init__(self, backend: FakeVerbs, row: int, key: int, size_bytes: int) -> None:
        self.lkey = self.rkey = key
        self._backend = backend
        self._row = row
        self._size_bytes = size_bytes

    def close(self) -> None:
        """Take it off the page. Idempotent."""
        with self._backend.page.lock:
            if int(self._backend.page.keys[self._row, 0]) == self.lkey:
                self._backend.page.keys[self._row] = 0
                self._backend.pinned_bytes -= self._size_bytes


class FakeQueues:
    """Implements ``rdma.backend.QueueSet``; reads happen inside ``post``."""

    def __init__(self, backend: FakeVerbs, count: int) -> None:
        self.queues = tuple(Queue(secrets.randbits(24) | 1, secrets.randbits(24)) for _ in range(count))
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._backend = backend
        self._completed: deque[Completion] = deque()
        self._reported: list[Completion] = []
        self._unanswered: deque[int] = deque()
        self._broken: set[int] = set()
        self._is_armed = False
        self._remote: _RemotePage | None = None
        self._peers: tuple[Queue, ...] = ()
        backend.num_open_queue_sets += 1

    def connect(self, route: Route, peers: tuple[Queue, ...], *, is_reader: bool) -> None:
        """Note the peer; an owner's queue pairs answer from here on."""
        self._remote, self._peers = _RemotePage(route.peer_gid), peers
        if not is_reader:
            with self._backend.page.lock:
                free = np.flatnonzero(self._backend.page.numbers == 0)[:len(self.queues)]
                if len(free) < len(self.queues):
                    raise TransferFailed("no more queue pairs", where="rdma")
                self._backend.page.numbers[free] = [queue.number for queue in self.queues]

    def post(self, index: int, first_wr_id: int, reads: Reads) -> None:
        """Do the reads, in order, until one fails."""
        backend = self._backend
        if backend.repeats:
            self._completed.extend(self._reported)
        last = len(reads.lengths) - 1
        for i in range(len(reads.lengths)):
            if index in self._broken:
                self._complete(first_wr_id + i, Status.FLUSHED)
                continue
            if 0 <= backend.hang_after <= backend.num_reads:
                self._unanswered.append(first_wr_id + i)
                continue
            backend.num_reads += 1
            status = self._read(index, reads, i)
            if status is not Status.OK:
                self._broken.add(index)
            if status is not Status.OK or i == last:
                self._complete(first_wr_id + i, status)

    def poll(self) -> list[Completion]:
        """Return what completed."""
        completed = list(self._completed)
        self._completed.clear()
        self._reported = completed or self._reported
        return completed

    def arm(self) -> None:
        """Ask for an event."""
        self._is_armed = True

    def take_event(self) -> None:
        """Consume an event."""
        os.eventfd_read(self.fd)

    def fail(self) -> None:
        """Flush what is unanswered."""
        self._broken.update(range(len(self.queues)))
        while self._unanswered:
            self._complete(self._unanswered.popleft(), Status.FLUSHED)

    def close(self) -> None:
        """Disconnect. Idempotent."""
        if self.fd < 0:
            return
        with self._backend.page.lock:
            numbers = self._backend.page.numbers
            numbers[np.isin(numbers, np.array([queue.number for queue in self.queues], np.uint64))] = 0
        self._backend.num_open_queue_sets -= 1
        fd, self.fd = self.fd, -1
        os.close(fd)

    def _read(self, index: int, reads: Reads, i: int) -> Status:
        target = _row_of(self._backend.page, reads.lkey)
        local, length = reads.local[i], reads.lengths[i]
        if target is None or local < int(target[1]) or local + length > int(target[1]) + int(target[2]):
            return Status.LOCAL
        if self._remote is None:
            return Status.OTHER
        return self._remote.read(self._peers[index].number, reads.rkey, reads.remote[i], local, length)

    def _complete(self, wr_id: int, status: Status) -> None:
        self._completed.append(Completion(wr_id, status, status.name))
        if self._is_armed:
            self._is_armed = False
            os.eventfd_write(self.fd, 1)


def _row_of(page: _Page, key: int) -> npt.NDArray[np.uint64] | None:
    found = page.keys[page.keys[:, 0] == key]
    return found[0] if len(found) else None


__all__ = ["FakeVerbs"]
