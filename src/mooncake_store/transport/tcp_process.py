"""Run the tcp read server in a process of its own: readers do not wait for the engine's Python, nor it for them.

Architecture::

    ServerProcess (in the engine)   holds the listening socket; starts the process, tells it which regions to serve
      └─ socketpair                 commands and answers, one at a time; a memfd travels along by SCM_RIGHTS
           └─ main() (this module)  maps memfds; reads other memory of its parent by process_vm_readv

Failure model: the process ends with its parent, however that ends: it watches the parent's pidfd. When the process ends
by itself, or does not answer and is ended for that, its regions are served from the parent, on the same socket: readers
lose a connection and open another. ``add`` raises when it cannot serve a region there.
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
from mooncake_store.transport.tcp_server import ReadServer, listen
from mooncake_store.transport.tls import NO_TLS, TlsContexts, TlsFiles, load_contexts

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 5.0
MESSAGE_MAX_BYTES = 4096


class Start(msgspec.Struct, frozen=True, tag="start"):
    """Serve readers, with these certificates."""

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
    """Say that a command is carried out, or why not."""

    error: str = ""


_PROGRAM = f"""import sys, msgspec
sys.path = msgspec.msgpack.decode(bytes.fromhex(sys.argv[4]))
from {__name__} import main
main()"""
_encode = msgspec.msgpack.encode
_commands = msgspec.msgpack.Decoder(Start | Add | Remove)
_answers = msgspec.msgpack.Decoder(Answer)


class ServerProcess:
    """A read server outside this process.

    Threads: every method may be called from any. One of ours, ``mooncake-tcp-process``, waits for the process to end.

    Raises:
        OSError: the address cannot be bound.
        TransferFailed: the process does not start; says why.
    """

    def __init__(self, host: str, tls: TlsContexts | None) -> None:
        self._lock = threading.Lock()
        self._tls = tls
        self._regions: dict[int, LocalMemory] = {}
        self._successor: ReadServer | None = None
        self._is_closed = False
        self._listener = listen(host)
        self.port: int = self._listener.getsockname()[1]
        self._link, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with child:
            fds = child.fileno(), self._listener.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *map(str, fds), str(os.getpid()), _encode(sys.path).hex()],
                pass_fds=fds, stdin=subprocess.DEVNULL)
        try:
            self._ask(Start(tls.files if tls else NO_TLS), timeout_s=START_TIMEOUT_S)
        except TransferFailed:
            self._process.wait()
            self._link.close()
            self._listener.close()
            raise
        self._watch = threading.Thread(target=self._succeed, name="mooncake-tcp-process", daemon=True)
        self._watch.start()

    def add(self, region_id: int, memory: LocalMemory) -> None:
        """Serve a region.

        Raises:
            TransferFailed: the process cannot read it, or is gone.
        """
        with self._lock:
            if memory.memfd < 0:
                libc.allow_any_tracer()
            self._ask(Add(region_id, memory.address, memory.size_bytes), memfd=memory.memfd)
            self._regions[region_id] = memory

    def remove(self, region_id: int) -> None:
        """Stop serving a region; once this returns its memory is not touched any more. Idempotent."""
        with self._lock:
            if self._regions.pop(region_id, None) is None:
                return
            if self._successor is not None:
                self._successor.remove(region_id)
                return
            try:
                self._ask(Remove(region_id))
            except TransferFailed as error:
                logger.error("%s", error.message)  # it is ended, and touches nothing any more

    def close(self) -> None:
        """End the process, and whoever took its place. Idempotent."""
        with self._lock:
            self._is_closed = True
            self._process.kill()
        self._watch.join()
        self._link.close()
        if self._successor is None:
            self._listener.close()
        else:
            self._successor.close()

    def _succeed(self) -> None:
        """Wait for the process to end, then take its place."""
        code = self._process.wait()
        with self._lock:
            if self._is_closed:
                return
            logger.error("the tcp server's process ended with code %d: serving %d regions from here", code,
                         len(self._regions))
            self._successor = ReadServer(self._listener, self._tls.accepting if self._tls else None)
            for region_id, memory in self._regions.items():
                self._successor.add(region_id, memory)

    def _ask(self, command: Start | Add | Remove, *, memfd: int = -1, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """Have a command carried out. A process that does not answer is ended: what it serves would be unknown.

        Raises:
            TransferFailed: it was not.
        """
        try:
            self._link.settimeout(timeout_s)
            socket.send_fds(self._link, [_encode(command)], [memfd] if memfd >= 0 else [])
            error = _answers.decode(self._link.recv(MESSAGE_MAX_BYTES)).error
        except (OSError, msgspec.DecodeError) as failure:
            self._process.kill()
            self._process.wait()
            error = f"the tcp server's process does not answer: {failure}"
        if error:
            raise TransferFailed(error, where="tcp", hint="set tcp_process to false to serve without it")


def _serve(link: socket.socket, listener: socket.socket, parent: int) -> None:
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
                    case Start(tls):
                        contexts = load_contexts(tls)
                        server = ReadServer(listener, contexts.accepting if contexts else None)
                    case Add() if server is not None:
                        _add(server, command, fds[0] if fds else -1, parent)
                    case Remove(region_id) if server is not None:
                        server.remove(region_id)
            except (OSError, MooncakeError, msgspec.DecodeError) as failure:
                error = str(failure)
            finally:
                for fd in fds:
                    os.close(fd)
            link.send(_encode(Answer(error)))


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
    link, listener = (socket.socket(fileno=int(argument)) for argument in sys.argv[1:3])
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # an engine binds itself, and us with it
    _serve(link, listener, int(sys.argv[3]))
    os._exit(0)
