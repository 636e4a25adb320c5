"""Prepare what a guest boots: Debian's kernel, unpacked once and never installed, and an initramfs that finds its root.

The guest's root is the host's `/`, read-only over 9p below a memory overlay: same paths, same Python, writes are lost.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple

METAPACKAGE = "linux-image-amd64"  # the cloud kernel has neither soft-RoCE nor 9p
EARLY_MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay")
COMPRESSIONS = {".xz": "xz", ".zst": "zstd", ".gz": "gzip"}
STEP_TIMEOUT_S = 300

INIT = """#!/bin/sh
/bin/busybox mkdir -p /proc /sys /dev /lower /rw /new
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for m in $(cat /modules.order); do insmod /modules/$m; done
O=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o $O,ro,cache=loose host /lower && mount -t tmpfs -o size=75% rw /rw \\
  && mkdir /rw/up /rw/wk && mount -t overlay -o lowerdir=/lower,upperdir=/rw/up,workdir=/rw/wk root /new \\
  && mount -t tmpfs run /new/run && mkdir /new/run/job && mount -t 9p -o $O,cache=none job /new/run/job \\
  || { echo "mounting the root failed"; echo o > /proc/sysrq-trigger; sleep 9; }
for d in proc sys dev; do mount --move /$d /new/$d; done
exec switch_root /new /bin/bash /run/job/guest.sh
"""


class Kernel(NamedTuple):
    """An unpacked kernel: its image, the folder of its modules, its release."""

    image: Path
    modules: Path
    release: str


def run(*command: str, cwd: Path | None = None) -> str:
    """Run a command; return what it prints. Raises CalledProcessError with that in it."""
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd, timeout=STEP_TIMEOUT_S).stdout


def find_kernel(cache: Path) -> Kernel | None:
    """Return the kernel in the cache, None when there is none."""
    for image in sorted(cache.glob("kernel/boot/vmlinuz-*")):
        release = image.name.removeprefix("vmlinuz-")
        for base in ("kernel/lib/modules", "kernel/usr/lib/modules"):
            modules = cache / base / release
            if (modules / "modules.dep").exists():
                return Kernel(image, modules, release)
    return None


def fetch_kernel(cache: Path) -> Kernel:
    """Return the kernel, downloading and unpacking its package when the cache is empty (70 MB; 400 MB on disk)."""
    found = find_kernel(cache)
    if found is not None:
        return found
    names = run("apt-cache", "depends", METAPACKAGE).split()
    package = next(name for name in names if name.startswith("linux-image-") and name != METAPACKAGE)
    unpacked = cache / f"kernel.{os.getpid()}"
    unpacked.mkdir(parents=True)
    run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package, cwd=unpacked)
    archive = next(unpacked.glob("*.deb"))
    run("dpkg-deb", "-x", str(archive), str(unpacked))
    archive.unlink()
    modules = next(unpacked.glob("**/lib/modules/*"))
    run("depmod", "-b", str(modules.parents[2]), modules.name)
    shutil.rmtree(cache / "kernel", ignore_errors=True)
    unpacked.rename(cache / "kernel")
    found = find_kernel(cache)
    assert found is not None, f"{package} has no kernel"
    return found


def build_initramfs(kernel: Kernel) -> bytes:
    """Return an archive with busybox, the modules that mounting the root needs, and INIT."""
    base = kernel.modules.parents[2]
    order: list[Path] = []
    for name in EARLY_MODULES:
        for line in run("modprobe", "-d", str(base), "-S", kernel.release, "--show-depends", name).splitlines():
            kind, _, path = line.partition(" ")
            if kind == "insmod" and Path(path.strip()) not in order:
                order.append(Path(path.strip()))
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "modules")]
    names = []
    for path in order:
        data, name = path.read_bytes(), path.name
        if path.suffix in COMPRESSIONS:
            data = subprocess.run([COMPRESSIONS[path.suffix], "-dc"], input=data, check=True, capture_output=True,
                                  timeout=STEP_TIMEOUT_S).stdout
            name = path.stem
        names.append(name)
        entries.append((f"modules/{name}", stat.S_IFREG | 0o644, data))
    entries.append(("modules.order", stat.S_IFREG | 0o644, "\n".join(names).encode()))
    busybox = shutil.which("busybox")
    assert busybox is not None
    entries.append(("bin/busybox", stat.S_IFREG | 0o755, Path(busybox).read_bytes()))
    entries.append(("bin/sh", stat.S_IFLNK | 0o777, b"busybox"))
    entries.append(("init", stat.S_IFREG | 0o755, INIT.encode()))
    return _cpio(entries)


def _cpio(entries: list[tuple[str, int, bytes]]) -> bytes:
    """Return an uncompressed newc archive of (name, mode, bytes)."""
    out = bytearray()
    for inode, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)
