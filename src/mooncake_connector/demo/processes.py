"""Start child processes, know when they are ready, and leave none behind.

Architecture: a :class:`Supervisor` owns a run directory and its children; every child has a log file there.

Failure model: a child that ends or stays silent past its deadline raises :class:`ProcessFailed` with the end of its log
and what to do. Leaving the ``with`` block stops everything, whatever the reason; should we be killed, the kernel tells
the children (PR_SET_PDEATHSIG).

Threading model: one thread. ``start`` must run in a thread that outlives the child, because the kernel's parent-death
signal follows the thread that started it.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import msgspec

from mooncake_store.errors import MooncakeError

POLL_S = 0.2
PROGRESS_S = 8.0
PROBE_TIMEOUT_S = 2.0
STOP_TIMEOUT_S = 15.0
KILL_TIMEOUT_S = 5.0
LOG_LINES_MAX = 15
LOG_TAIL_MAX_BYTES = 64 << 10
PORT_FIRST = 20_000
PORT_LAST = 31_999
PORT_TRIES_MAX = 2000

# Runs first in the child: asks for a SIGTERM when the parent dies, and leaves at once if it is dead already.
_EXEC = ("import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); "
         "os.getppid() == int(sys.argv[1]) or sys.exit(143); os.execvp(sys.argv[2], sys.argv[2:])")


class ProcessFailed(MooncakeError):
    """A child ended, or did not become ready in time; carries the end of its log."""


class ProcessSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to run and how to see that it is ready.

    Attributes:
        name: names the process and its log file.
        command: program and arguments.
        environment: variables set on top of our own.
        ready_url: answers 200 once the process is ready; wins over ``ready_port``.
        ready_port: accepts a connection on 127.0.0.1 once the process is ready; 0 = ready when started.
        ready_timeout_s: longest start.
        hint: what to do when it does not start.
        stop_order: processes with a lower number are stopped first.
    """

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = {}
    ready_url: str = ""
    ready_port: int = 0
    ready_timeout_s: float = 60.0
    hint: str = ""
    stop_order: int = 0


class Child:
    """One running process: its spec, its log and its handle."""

    def __init__(self, spec: ProcessSpec, log_path: Path) -> None:
        self.spec = spec
        self.log_path = log_path
        self.started_at = time.monotonic()
        self.is_ready = False
        argv = [sys.executable, "-S", "-E", "-c", _EXEC, str(os.getpid())]
        if spec.environment:
            argv += ["env", *(f"{key}={value}" for key, value in spec.environment.items())]
        with log_path.open("ab") as log:
            self.process = subprocess.Popen([*argv, *spec.command], stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=subprocess.STDOUT, start_new_session=True)

    @property
    def name(self) -> str:
        """Return the name from the spec."""
        return self.spec.name

    @property
    def pid(self) -> int:
        """Return the process id, which is also its session's."""
        return self.process.pid

    def pids(self) -> list[int]:
        """Return every live process of the child's session: itself and its descendants."""
        return session_pids(self.pid)

    def has_ended(self) -> bool:
        """Tell whether the process is gone."""
        return self.process.poll() is not None

    def probe(self) -> bool:
        """Tell whether the process answers; remembers a yes."""
        if not self.is_ready:
            self.is_ready = _answers(self.spec)
        return self.is_ready

    def log_tail(self, num_lines: int = LOG_LINES_MAX) -> list[str]:
        """Return the last non-empty lines of the log."""
        with contextlib.suppress(FileNotFoundError), self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - LOG_TAIL_MAX_BYTES))
            lines = [line.rstrip() for line in log.read().decode(errors="replace").splitlines()]
            return [line for line in lines if line][-num_lines:]
        return []

    def failure(self, what: str) -> ProcessFailed:
        """Build the error that tells what happened to this child."""
        tail = "".join(f"\n    | {line[:300]}" for line in self.log_tail())
        return ProcessFailed(f"{self.name} {what}; its last words:{tail or ' (none)'}", where=str(self.log_path),
                             hint=self.spec.hint or "read the log")

    def signal(self, number: int, *, whole_session: bool = False) -> None:
        """Send a signal to the process, or to it and all its descendants. A dead process is no error."""
        for pid in self.pids() if whole_session else [self.pid]:
            with contextlib.suppress(ProcessLookupError):
                if pid != self.pid or not self.has_ended():
                    os.kill(pid, number)


class Supervisor:
    """Owns a set of children; use it as a context manager.

    Args:
        run_dir: where logs go; created.
        report: receives progress lines; one at least every ``PROGRESS_S`` while waiting.
    """

    def __init__(self, run_dir: Path, *, report: Callable[[str], None] | None = None) -> None:
        self.run_dir = run_dir
        self.report = report or _print
        self.children: dict[str, Child] = {}
        run_dir.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def start(self, spec: ProcessSpec) -> Child:
        """Start one process and return at once; :meth:`wait_ready` waits for it.

        Raises:
            ProcessFailed: if a process of that name is still running.
        """
        old = self.children.get(spec.name)
        if old is not None and not old.has_ended():
            raise old.failure("is running already")
        child = Child(spec, self.run_dir / f"{spec.name}.log")
        self.children[spec.name] = child
        return child

    def wait_ready(self, names: Iterable[str] | None = None) -> None:
        """Wait until the named children (default: all) answer.

        Raises:
            ProcessFailed: for the first that ends or exceeds its deadline.
        """
        waiting = [self.children[name] for name in (names if names is not None else list(self.children))]
        waiting = [child for child in waiting if child.has_ended() or not child.is_ready]
        began = last_line = time.monotonic()
        while waiting:
            for child in list(waiting):
                if child.probe():
                    waiting.remove(child)
                    self.report(f"  {child.name} is ready after {time.monotonic() - child.started_at:.0f} s")
                    last_line = time.monotonic()
                elif child.has_ended():
                    raise child.failure(f"ended with code {child.process.returncode} before it was ready")
                elif time.monotonic() - child.started_at > child.spec.ready_timeout_s:
                    raise child.failure(f"was not ready after {child.spec.ready_timeout_s:.0f} s")
            if waiting and time.monotonic() - last_line > PROGRESS_S:
                last_line = time.monotonic()
                words = (waiting[0].log_tail(1) or [""])[-1]
                self.report(f"  {last_line - began:3.0f} s: waiting for {', '.join(c.name for c in waiting)}"
                            f" ({words[:90]})")
            if waiting:
                time.sleep(POLL_S)

    def check_alive(self) -> None:
        """Raise ProcessFailed when a child has ended."""
        for child in self.children.values():
            if child.has_ended():
                raise child.failure(f"ended with code {child.process.returncode}")

    def stop(self, name: str) -> None:
        """Stop one child with SIGTERM, and with SIGKILL what is left of it after a while."""
        self._stop([self.children[name]])

    def kill(self, name: str) -> None:
        """Kill one child and all its descendants with SIGKILL, as a crash would."""
        child = self.children[name]
        child.signal(signal.SIGKILL, whole_session=True)
        child.process.wait(KILL_TIMEOUT_S)
        child.signal(signal.SIGKILL, whole_session=True)

    def restart(self, name: str, *, wait: bool = True) -> Child:
        """Stop a child if it runs, and start it again with the same spec (same ports)."""
        if not self.children[name].has_ended():
            self.stop(name)
        child = self.start(self.children[name].spec)
        if wait:
            self.wait_ready([name])
        return child

    def close(self) -> None:
        """Stop everything, in ``stop_order``. Idempotent; bounded; a second Ctrl-C kills at once."""
        try:
            for order in sorted({child.spec.stop_order for child in self.children.values()}):
                self._stop([child for child in self.children.values() if child.spec.stop_order == order])
        finally:
            for child in self.children.values():
                child.signal(signal.SIGKILL, whole_session=True)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(KILL_TIMEOUT_S)

    def _stop(self, children: Sequence[Child]) -> None:
        for child in children:
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.1, deadline - time.monotonic()))
            child.signal(signal.SIGKILL, whole_session=True)
            child.process.wait(KILL_TIMEOUT_S)


def session_pids(session: int) -> list[int]:
    """Return the live processes of a session. Source: field 6 of /proc/PID/stat."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                fields = Path("/proc", entry, "stat").read_text().rsplit(")", 1)[1].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    found.append(int(entry))
    return sorted(found)


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the CPU time that processes have used so far; a dead one counts 0. Source: /proc/PID/stat."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path("/proc", str(pid), "stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def free_ports(count: int) -> list[int]:
    """Return distinct TCP ports of 127.0.0.1 that nobody uses, outside the range of outgoing connections.

    Raises:
        ProcessFailed: if there are none.
    """
    ports: list[int] = []
    for _ in range(PORT_TRIES_MAX):
        port = random.randint(PORT_FIRST, PORT_LAST)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in ports:
                ports.append(port)
        if len(ports) == count:
            return ports
    raise ProcessFailed(f"no {count} free ports between {PORT_FIRST} and {PORT_LAST}",
                        hint="stop what listens there (ss -ltnp)")


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into KeyboardInterrupt while the block runs, so that ``with`` blocks clean up."""
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGHUP)
    previous = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


def _answers(spec: ProcessSpec) -> bool:
    if spec.ready_url:
        # HTTPError (a 503 while starting) is an OSError too
        with contextlib.suppress(OSError), \
                urllib.request.urlopen(spec.ready_url, timeout=PROBE_TIMEOUT_S) as answer:
            return bool(answer.status == 200)
        return False
    if spec.ready_port:
        with contextlib.suppress(OSError), \
                socket.create_connection(("127.0.0.1", spec.ready_port), PROBE_TIMEOUT_S):
            return True
        return False
    return True


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
