"""Wait for sockets, a wake-up and the death of processes in one place.

A pidfd of a peer on this machine becomes readable when it dies, so its transfers end at once instead of by timeout.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import NamedTuple

import zmq


class Events(NamedTuple):
    """What happened: did the socket get something, and which watched pids died."""

    readable: bool
    dead_pids: list[int]


class Watch:
    """Polls one ZeroMQ socket, an eventfd that other threads ring, and pidfds. Threads: ``ring`` any, the rest one."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._bell, zmq.POLLIN)
        self._pids: dict[int, int] = {}

    def ring(self) -> None:
        """Make ``wait`` return. Never blocks."""
        with self._lock:  # a closed descriptor's number may be somebody else's by now
            if self._bell >= 0:
                with contextlib.suppress(BlockingIOError):  # rung 2^64 times: it will wake
                    os.eventfd_write(self._bell, 1)

    def watch_pid(self, pid: int) -> bool:
        """Watch a process of this pid namespace; False when it is already gone."""
        if pid in self._pids.values():
            return True
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return False
        self._pids[pidfd] = pid
        self._poller.register(pidfd, zmq.POLLIN)
        return True

    def wait(self, timeout_ms: int) -> Events:
        """Wait for something, at most ``timeout_ms``."""
        try:
            ready = dict(self._poller.poll(timeout_ms))
        except OSError:  # interrupted by a signal
            return Events(False, [])
        if self._bell in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._bell)
        dead: list[int] = []
        for pidfd in [fd for fd in self._pids if fd in ready]:
            self._poller.unregister(pidfd)
            os.close(pidfd)
            dead.append(self._pids.pop(pidfd))
        return Events(self._socket in ready, dead)

    def close(self) -> None:
        """Release every descriptor but the socket. Idempotent."""
        for pidfd in self._pids:
            os.close(pidfd)
        self._pids.clear()
        with self._lock:
            if self._bell >= 0:
                os.close(self._bell)
                self._bell = -1
