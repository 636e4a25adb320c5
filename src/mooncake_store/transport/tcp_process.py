"""Run the tcp read server in a process of its own: readers do not wait for the engine's Python, nor it for them.

Architecture::

    ServerProcess (in the engine)   starts the process, tells it which regions to serve; same interface as ReadServer
      └─ socketpair                 commands and answers, one at a time; a memfd travels along by SCM_RIGHTS
           └─ main() (this module)  maps memfds; reads other memory of its parent by process_vm_readv

Failure model: the process ends with its parent, however that ends: it watches the parent's pidfd. When it ends
by itself, peers find nobody and go on without us; ``add`` then raises, and the log has one error.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading

import msgspec
import numpy as np

from mooncake_store.errors import MooncakeError, TransferFailed
from mooncake_store.log import set_up_logging
from mooncake_store.transport import libc
from mooncake_store.transport.base import LocalMemory
from mooncake_store.transport.copying import single_range
from mooncake_store.transport.memory import Mapping, is_sealed
from mooncake_store.transport.tcp_server import ReadServer
from mooncake_store.transport.tls import TlsFiles, load_contexts

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 5.0
MESSAGE_MAX_BYTES = 4096


class Start(msgspec.Struct, frozen=True, tag="start"):
    """What the process must know: where to bind, with which certificates."""

    host: str
    tls: TlsFiles


class Add(msgspec.Struct, frozen=True, tag="add"):
    """Serve a region of the parent; its memfd comes along, or else it is read at ``address``."""

    region_id: int
    address: int
    size_bytes: int


class Remove(msgspec.Struct, frozen=True, tag="remove"):
    """Stop serving a region."""

    region_id: int


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """Say that a command is carried out, or why not; ``port`` is where the process listens."""

    port: int
    error: str = ""


_PROGRAM = f"""import sys, msgspec
sys.path = msgspec.msgpack.decode(bytes.fromhex(sys.argv[3]))
from {__name__} import main
main()"""
_encode = msgspec.msgpack.encode
_commands = msgspec.msgpack.Decoder(Start | Add | Remove)
_answers = msgspec.msgpack.Decoder(Answer)


class ServerProcess:
    """A read server outside this process.

    Threads: every method may be called from any.

    Raises:
        TransferFailed: it does not start; says why.
    """

    def __init__(self, host: str, tls: TlsFiles) -> None:
        self._lock = threading.Lock()
        self._kept: dict[int, LocalMemory] = {}
        self._link, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        libc.allow_any_tracer()
        with child:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(child.fileno()), str(os.getpid()), _encode(sys.path).hex()],
                pass_fds=[child.fileno()], stdin=subprocess.DEVNULL)
        try:
            self.port: int = self._ask(Start(host, tls), timeout_s=START_TIMEOUT_S).port
        except TransferFailed:
            self.close()
            raise

    def add(self, region_id: int, memory: LocalMemory) -> None:
        """Serve a region.

        Raises:
            TransferFailed: the process cannot read it, or is gone.
        """
        with self._lock:
            self._ask(Add(region_id, memory.address, memory.size_bytes), memfd=memory.memfd)
            self._kept[region_id] = memory

    def remove(self, region_id: int) -> None:
        """Stop serving a region; once this returns its memory is not touched any more. Idempotent."""
        with self._lock:
            if region_id not in self._kept:
                return
            try:
                self._ask(Remove(region_id))
            except TransferFailed as error:
                logger.error("ending the tcp server's process: %s", error.message)
                self._process.kill()
                self._process.wait()
            del self._kept[region_id]

    def close(self) -> None:
        """End the process. Idempotent."""
        with self._lock:
            self._link.close()
            self._process.kill()
            self._process.wait()
            self._kept.clear()

    def _ask(self, command: Start | Add | Remove, *, memfd: int = -1, timeout_s: float = ANSWER_TIMEOUT_S) -> Answer:
        """Have a command carried out. Raises TransferFailed."""
        try:
            self._link.settimeout(timeout_s)
            socket.send_fds(self._link, [_encode(command)], [memfd] if memfd >= 0 else [])
            answer = _answers.decode(self._link.recv(MESSAGE_MAX_BYTES))
        except (OSError, msgspec.DecodeError) as error:
            code = self._process.poll()
            state = "does not answer" if code is None else "has ended"
            raise TransferFailed(f"the tcp server's process {state}: {error}", where="tcp",
                                 hint="set tcp_process to false to serve without it") from error
        if answer.error:
            raise TransferFailed(answer.error, where="tcp", hint="set tcp_process to false to serve without it")
        return answer


def _serve(link: socket.socket, parent: int) -> None:
    """Carry out commands until the parent has gone."""
    server: ReadServer | None = None
    parent_fd = os.pidfd_open(parent)
    with selectors.DefaultSelector() as selector:
        selector.register(link, selectors.EVENT_READ)
        selector.register(parent_fd, selectors.EVENT_READ)
        while all(key.fileobj is link for key, _ in selector.select()):
            data, fds, _, _ = socket.recv_fds(link, MESSAGE_MAX_BYTES, 1)
            if not data:
                return
            error = ""
            try:
                command = _commands.decode(data)
                match command:
                    case Start(host, tls):
                        contexts = load_contexts(tls)
                        server = ReadServer(host, contexts.accepting if contexts else None)
                    case Add() if server is not None:
                        _add(server, command, fds[0] if fds else -1, parent)
                    case Remove(region_id) if server is not None:
                        server.remove(region_id)
            except (OSError, MooncakeError, msgspec.DecodeError) as failure:
                error = str(failure)
            finally:
                for fd in fds:
                    os.close(fd)
            link.send(_encode(Answer(server.port if server else 0, error)))


def _add(server: ReadServer, command: Add, memfd: int, parent: int) -> None:
    """Map a region, or see that it can be read. Raises OSError."""
    if memfd >= 0 and is_sealed(memfd):
        mapping = Mapping(memfd, command.size_bytes, writable=False)
        server.add(command.region_id, LocalMemory(mapping.address, command.size_bytes, owner=mapping))
        return
    byte = np.zeros(1, np.uint8)
    for address in (command.address, command.address + command.size_bytes - 1):
        libc.read_process(parent, single_range(byte.ctypes.data, 1), single_range(address, 1))
    server.add(command.region_id, LocalMemory(command.address, command.size_bytes), pid=parent)


def main() -> None:
    """Serve for the parent that started us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    set_up_logging("info")
    link = socket.socket(fileno=int(sys.argv[1]))
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # an engine binds itself, and us with it
    _serve(link, int(sys.argv[2]))
    os._exit(0)
