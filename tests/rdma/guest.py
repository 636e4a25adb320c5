"""Run a command in a throw-away QEMU guest that has two soft-RoCE devices, for machines without RDMA.

    python tests/rdma/guest.py COMMAND [ARG...]

The guest sees the host's files (guest_kernel.py), has `rxe0` at 192.0.2.1 and `rxe1` at 192.0.2.2, runs the command in
the current folder and streams its output; its exit code comes back. Rail i reaches rail i only. Needs root, and the
packages of provisions.py. KVM is used where the CPU really has it, else emulation: code then runs tens of times slower.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rdma.guest_kernel import Kernel, build_initramfs, fetch_kernel

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "rdma"
HELLO = b"@@guest is up@@\n"
BOOT_TIMEOUT_S = 180.0
SILENCE_MAX_S = 20.0
NUM_RAILS = 2
NO_RESULT = 125
TIMED_OUT = 124

SCRIPT = r"""
exec </dev/null
port=/dev/$(basename "$(dirname "$(grep -lx out /sys/class/virtio-ports/*/name)")")
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /dev/shm /dev/pts && mount -t tmpfs shm /dev/shm && mount -t devpts pts /dev/pts
ln -sf /proc/self/fd /dev/fd
exec 3>"$port"
printf '@@guest is up@@\n' >&3
mkdir -p /lib/modules/$(uname -r) && mount --bind "$GUEST_MODULES" /lib/modules/$(uname -r)
setup() (
  set -ex
  ip link set lo up
  modprobe -a rdma_rxe rdma_ucm dummy
  for ((i = 0; i < GUEST_RAILS; i++)); do
    ip link add "eth$i" type dummy
    ip link set "eth$i" address "02:00:00:00:00:0$((i + 1))" mtu 4200 up
    ip addr add "192.0.2.$((i + 1))/24" dev "eth$i"
    rdma link add "rxe$i" type rxe netdev "eth$i"
  done
)
rc=125
setup
if [ $? = 0 ] && ulimit -l unlimited && cd "$GUEST_FOLDER"; then
  bash /run/job/command.sh >&3 2>&3
  rc=$?
fi
echo $rc > /run/job/rc
sync
echo o > /proc/sysrq-trigger
sleep 30
"""


class GuestResult(NamedTuple):
    """How a guest ended: the command's exit code, TIMED_OUT or NO_RESULT, and the end of the guest's console."""

    code: int
    boot_s: float
    total_s: float
    console: str


def has_kvm() -> bool:
    """Tell whether KVM works. Its device node alone is not enough: a CPU without vmx or svm hangs a stock kernel."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return os.access("/dev/kvm", os.R_OK | os.W_OK) and ("vmx" in flags or "svm" in flags)


def run_in_guest(command: list[str], environment: Mapping[str, str], *, folder: Path, timeout_s: float,
                 write: Callable[[bytes], None], results: Path | None = None) -> GuestResult:
    """Boot, run the command, hand on its output as it comes.

    Args:
        command: to run; its program must exist in the host's file system.
        environment: its variables.
        folder: to run it in.
        timeout_s: for the command alone.
        write: gets the output, and a line whenever nothing was said for SILENCE_MAX_S.
        results: where the files go that the command left in /run/job/results.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    kernel = fetch_kernel(CACHE)
    with tempfile.TemporaryDirectory(prefix="guest-") as name:
        job = Path(name)
        (job / "initrd").write_bytes(build_initramfs(kernel))
        exports = [f"export {key}={shlex.quote(value)}\n" for key, value in environment.items()]
        (job / "command.sh").write_text("".join(exports) + f"exec {shlex.join(command)}\n")
        settings = {"GUEST_FOLDER": str(folder), "GUEST_MODULES": str(kernel.modules), "GUEST_RAILS": str(NUM_RAILS)}
        (job / "guest.sh").write_text(
            "".join(f"{key}={shlex.quote(value)}\n" for key, value in settings.items()) + SCRIPT)
        (job / "results").mkdir()
        boot_s, is_late = _boot(kernel, job, timeout_s, write)
        code = NO_RESULT
        if (job / "rc").exists():
            code = int((job / "rc").read_text() or NO_RESULT)
        elif is_late and boot_s:
            code = TIMED_OUT
        if results is not None:
            shutil.copytree(job / "results", results, dirs_exist_ok=True)
        log = job / "console.log"
        console = "\n".join(log.read_text(errors="replace").splitlines()[-40:]) if log.exists() else ""
    return GuestResult(code, boot_s, time.monotonic() - began, console)


def _boot(kernel: Kernel, job: Path, timeout_s: float, write: Callable[[bytes], None]) -> tuple[float, bool]:
    """Run the guest to its end; return the seconds its boot took (0: it never came up), and whether it was stopped."""
    prctl = ctypes.CDLL(None).prctl  # PR_SET_PDEATHSIG: the guest dies with us, even if we are killed
    machine = subprocess.Popen(_qemu(kernel, job), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               start_new_session=True, preexec_fn=lambda: prctl(1, signal.SIGKILL))
    assert machine.stdout is not None
    started = since = time.monotonic()
    boot_s, seen = 0.0, b""
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(machine.stdout, selectors.EVENT_READ)
            while True:
                left_s = since + (timeout_s if boot_s else BOOT_TIMEOUT_S) - time.monotonic()
                if left_s <= 0:
                    return boot_s, True
                if not selector.select(min(left_s, SILENCE_MAX_S)):
                    write(b"   [guest: %.0f s]\n" % (time.monotonic() - started))
                    continue
                data = os.read(machine.stdout.fileno(), 65536)
                if not data:
                    machine.wait(10)
                    return boot_s, False
                if not boot_s:
                    seen += data
                    if HELLO not in seen:
                        continue
                    data = seen.split(HELLO, 1)[1]
                    since = time.monotonic()
                    boot_s = since - started
                    write(b"   [guest is up after %.0f s]\n" % boot_s)
                write(data)
    except subprocess.TimeoutExpired:
        return boot_s, True
    finally:
        machine.kill()
        machine.wait()
        machine.stdout.close()


def _qemu(kernel: Kernel, job: Path) -> list[str]:
    share = "security_model=none,multidevs=remap"
    # no newer CPU: numpy would sort with AVX2, and QEMU 7.2 emulates something in that wrongly
    emulated = ["-accel", "tcg,thread=multi", "-cpu", "Nehalem"]
    accelerator = ["-accel", "kvm", "-cpu", "host"] if has_kvm() else emulated
    # stdout as a file, not as `stdio`: that closes when stdin ends, and the guest would wait for ever to write
    return ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "3G",
            "-smp", str(min(4, os.cpu_count() or 1)), "-nic", "none",
            "-object", "rng-random,id=r,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=r",
            "-kernel", str(kernel.image), "-initrd", str(job / "initrd"),
            "-append", "console=ttyS0 loglevel=4 panic=-1 mitigations=off tsc=reliable random.trust_cpu=on "
                       "net.ifnames=0",
            "-serial", f"file:{job}/console.log",
            "-virtfs", f"local,path=/,mount_tag=host,readonly=on,{share}",
            "-virtfs", f"local,path={job},mount_tag=job,{share}",
            "-device", "virtio-serial-pci", "-chardev", "file,id=out,path=/dev/stdout",
            "-device", "virtserialport,chardev=out,name=out", *accelerator]


def main() -> int:
    """Run the command line's command with this process's variables; return its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    kept = ("HOME", "LANG", "PYTHONPATH", "VIRTUAL_ENV")
    environment = {key: os.environ[key] for key in kept if key in os.environ}

    def write(data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    result = run_in_guest(sys.argv[1:], environment, folder=Path.cwd(), timeout_s=900.0, write=write)
    if result.code in (NO_RESULT, TIMED_OUT):
        print(result.console, file=sys.stderr)
    print(f"guest: boot {result.boot_s:.1f} s, total {result.total_s:.1f} s, exit {result.code}", file=sys.stderr)
    return result.code


if __name__ == "__main__":
    sys.exit(main())
