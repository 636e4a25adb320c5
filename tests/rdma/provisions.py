"""Find, and as root install, what running tests in a soft-RoCE guest needs.

The guest's Python needs our test tools and pyverbs, which the distribution builds for its own Python only. So: this
very environment when its Python is of that version and uses a shared libpython, with a folder on PYTHONPATH that holds
nothing but pyverbs; else a virtual environment of the distribution's Python, made once.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rdma.guest import CACHE
from rdma.guest_kernel import find_kernel

PACKAGES = ("qemu-system-x86", "busybox-static", "kmod", "iproute2", "rdma-core", "ibverbs-providers",
            "python3-pyverbs", "python3-venv")
PROGRAMS = ("qemu-system-x86_64", "busybox", "modprobe", "depmod", "ip", "rdma")
SYSTEM_PYTHON = Path("/usr/bin/python3")
SYSTEM_PYVERBS = Path("/usr/lib/python3/dist-packages/pyverbs")
NEEDED = "import pyverbs.qp, numpy, msgspec, zmq, prometheus_client, psutil, pytest, pytest_timeout, hypothesis"
INSTALLED = ("msgspec", "pyzmq", "aiohttp", "prometheus_client", "psutil", "numpy", "etcd-sdk-python", "protobuf",
             "pytest>=8", "pytest-timeout", "pytest-asyncio", "hypothesis")
STEP_TIMEOUT_S = 900.0
BEAT_S = 10.0


class Provisions(NamedTuple):
    """The Python for the guest, and what its PYTHONPATH must begin with (may be empty)."""

    python: Path
    path: str


def obstacle() -> str:
    """Return what is missing and cannot be installed here, empty when the guest can run."""
    if sysconfig.get_platform() != "linux-x86_64":
        return f"the guest is x86-64, this machine {sysconfig.get_platform()}"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if not SYSTEM_PYVERBS.is_dir():
        missing.append("pyverbs")
    if os.geteuid() != 0:
        return "needs root" + (f" and {', '.join(missing)}" if missing else "")
    if (missing or find_kernel(CACHE) is None) and shutil.which("apt-get") is None:
        return f"needs {', '.join([*missing, 'a kernel package'])}, and there is no apt"
    return ""


def install(say: Callable[[str], None]) -> Provisions:
    """Install what is missing; return the Python to use. Raises RuntimeError with the end of a failed step's output."""
    if any(shutil.which(name) is None for name in PROGRAMS) or not SYSTEM_PYVERBS.is_dir():
        _step("apt-get update", ["apt-get", "-q", "update"], say)
        _step(f"apt-get install {' '.join(PACKAGES)}",
              ["apt-get", "-q", "install", "-y", "--no-install-recommends", *PACKAGES], say)
    if find_kernel(CACHE) is None:
        # the lists may be older than the package they name
        _step("apt-get update", ["apt-get", "-q", "update"], say)
    return _this_python() or _system_venv(say)


def _this_python() -> Provisions | None:
    if importlib.util.find_spec("pyverbs") is not None:
        return Provisions(Path(sys.executable), "")
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        return None  # it would load a second libpython with pyverbs
    folder = CACHE / "pyverbs-only"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "pyverbs"
    if not link.is_symlink():
        link.symlink_to(SYSTEM_PYVERBS)
    return Provisions(Path(sys.executable), str(folder)) if _works(Path(sys.executable), str(folder)) else None


def _system_venv(say: Callable[[str], None]) -> Provisions:
    folder = CACHE / "venv"
    python = folder / "bin" / "python"
    if not _works(python, ""):
        shutil.rmtree(folder, ignore_errors=True)
        _step("make an environment of the distribution's Python",
              [str(SYSTEM_PYTHON), "-m", "venv", "--system-site-packages", str(folder)], say)
        _step("install the test tools there", [str(python), "-m", "pip", "install", "-q", *INSTALLED], say)
    if not _works(python, ""):
        raise RuntimeError(f"{python} cannot import pyverbs and the test tools")
    return Provisions(python, "")


def _works(python: Path, path: str) -> bool:
    if not python.exists():
        return False
    environment = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": path}
    return subprocess.run([str(python), "-c", NEEDED], env=environment, capture_output=True, check=False,
                          timeout=120).returncode == 0


def _step(title: str, command: list[str], say: Callable[[str], None]) -> None:
    say(f"== {title}")
    began = time.monotonic()
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with (CACHE / "step.log").open("w+b") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   env=environment)
        try:
            while process.poll() is None:
                if time.monotonic() - began > STEP_TIMEOUT_S:
                    raise RuntimeError(f"{title}: took longer than {STEP_TIMEOUT_S:g} s")
                try:
                    process.wait(BEAT_S)
                except subprocess.TimeoutExpired:
                    say(f"   [{time.monotonic() - began:.0f} s]")
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            log.seek(0)
            end = log.read()[-3000:].decode(errors="replace")
            raise RuntimeError(f"{title}: exit code {process.returncode}\n{end}")
