"""Open RDMA ports through pyverbs; the only module that imports it, and only when a port is there to be opened.

pyverbs is a part of rdma-core and must be of the same release as the system's libraries, so it comes from the
distribution, never from pip (docs/operating/rdma.md). Written for the releases 39 to 59, whose names differ here and
there: everything is looked up by feature. Every call of pyverbs holds the GIL to its end.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import logging
import resource
import secrets
import threading
from typing import Any, NamedTuple

from mooncake_store.errors import TransferFailed
from mooncake_store.transport.rdma import devices
from mooncake_store.transport.rdma.backend import QueueSet, Registration
from mooncake_store.transport.rdma.gids import ANY_INDEX, Gid, offerable
from mooncake_store.transport.rdma.queues import ClassicQueues, ExtendedQueues, Pyverbs
from mooncake_store.transport.rdma.rails import Rail, choose_rails

logger = logging.getLogger(__name__)

INSTALL_HINT = ("install it from the distribution, for its own Python: apt install python3-pyverbs ibverbs-providers, "
                "and use a virtual environment made with --system-site-packages; see docs/operating/rdma.md")
READS_MAX = 16
_IMPORT_LOCK = threading.Lock()
_loaded: list[Pyverbs] = []


def load() -> Pyverbs:
    """Import pyverbs, once, and undo what that does to the root logger.

    Raises:
        TransferFailed: it is not installed, or does not fit the system's libraries; the hint says what to do.
    """
    with _IMPORT_LOCK:
        if not _loaded:
            _loaded.append(_import())
        return _loaded[0]


def _import() -> Pyverbs:
    if importlib.util.find_spec("pyverbs") is None:
        raise TransferFailed("pyverbs is not installed", hint=INSTALL_HINT)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        modules = {name: importlib.import_module(f"pyverbs.{name}")
                   for name in ("device", "pd", "cq", "mr", "qp", "wr", "addr", "pyverbs_error")}
        enums = _import_enums()
    except ImportError as error:
        raise TransferFailed(
            f"pyverbs does not import: {error}",
            hint="pyverbs and libibverbs must come from one rdma-core release (dpkg -l libibverbs1 python3-pyverbs), "
                 f"and this Python must be of the version it was built for; {INSTALL_HINT}") from error
    finally:
        # pyverbs calls logging.basicConfig(level=INFO)
        root.handlers[:] = handlers
        root.setLevel(level)
    return Pyverbs(
        device=modules["device"], pd=modules["pd"], cq=modules["cq"], mr=modules["mr"], qp=modules["qp"],
        wr=modules["wr"], addr=modules["addr"], enums=enums, error=modules["pyverbs_error"].PyverbsError,
        status_names={value: name for name, value in vars(enums).items()
                      if name.startswith("IBV_WC_") and name.endswith(("_ERR", "_SUCCESS"))})


def _import_enums() -> Any:
    try:
        return importlib.import_module("pyverbs.libibverbs_enums")  # 59 and later
    except ImportError:
        return importlib.import_module("pyverbs.enums")


class VerbsBackend:
    """The ports of this machine. Implements ``backend.Backend``.

    Args:
        device_names: ports to use; empty = those near this process, see ``rails.choose_rails``.
        gid_index: entry of the ports' tables to use; -1 = by what reaches the peer.
        is_classic: do without the extended API, as with a provider that lacks it.
    """

    def __init__(self, *, device_names: tuple[str, ...] = (), gid_index: int = ANY_INDEX,
                 is_classic: bool = False) -> None:
        self._device_names = device_names
        self._gid_index = gid_index
        self._is_classic = is_classic

    def probe(self) -> str:
        """Look for ports first, then for pyverbs, then open a port: where there is none, nothing is imported."""
        rails = self.rails()
        if not rails:
            named = f" among {', '.join(self._device_names)}" if self._device_names and devices.find_rails() else ""
            return f"no active RDMA port{named}" if named else devices.explain_absence()
        try:
            self.open(rails[0]).close()
        except TransferFailed as error:
            return f"{error.message} ({error.hint})" if error.hint else error.message
        return ""

    def rails(self) -> list[Rail]:
        """Return the ports near this process, or those that were named, sorted by device name."""
        chosen = choose_rails(devices.find_rails(), devices.current_place(), devices=self._device_names)
        return [rail._replace(gids=offerable(rail.gids, self._gid_index)) for rail in chosen]

    def open(self, rail: Rail) -> VerbsDevice:
        """Open a port.

        Raises:
            TransferFailed: pyverbs is missing or broken, or the device cannot be opened.
        """
        return VerbsDevice(load(), rail, is_classic=self._is_classic)

    def is_routed(self, own: Gid, peer: Gid) -> bool:
        """Ask the kernel's routing table."""
        return devices.is_routed(own, peer)


class VerbsDevice:
    """One opened port. Implements ``backend.Device``."""

    def __init__(self, api: Pyverbs, rail: Rail, *, is_classic: bool) -> None:
        self.rail = rail
        self._api = api
        self._is_classic = is_classic
        try:
            self._context = api.device.Context(name=rail.device)
            self._domain = api.pd.PD(self._context)
            port, limits = self._context.query_port(rail.port), self._context.query_device()
        except api.error as error:
            raise TransferFailed(
                f"cannot open {rail.device}: {error}", where="rdma",
                hint="the device nodes /dev/infiniband/* must be there and writable for this user (in a container: "
                     "--device=/dev/infiniband), and ibverbs-providers installed") from error
        self.mtu = int(port.active_mtu)
        self.reads_max = max(1, min(READS_MAX, limits.max_qp_rd_atom, limits.max_qp_init_rd_atom))

    def register(self, address: int, size_bytes: int, *, is_target: bool) -> Registration:
        """Pin memory and let the port use it. Holds the GIL while it pins.

        Raises:
            TransferFailed: the locked-memory limit is too low, or the memory cannot be pinned.
        """
        enums = self._api.enums
        access = enums.IBV_ACCESS_REMOTE_READ | (enums.IBV_ACCESS_LOCAL_WRITE if is_target else 0)
        try:
            region = self._api.mr.MR(self._domain, size_bytes, access, address=address)
        except self._api.error as error:
            raise explain_registration(getattr(error, "error_code", -1), size_bytes, str(error)) from error
        return VerbsRegistration(region)

    def open_queues(self, count: int, *, is_reader: bool) -> QueueSet:
        """Make queue pairs, extended ones where the provider has them.

        Raises:
            TransferFailed: the device has no more of them.
        """
        packet_numbers = [secrets.randbits(24) for _ in range(count)]
        kinds: list[type[ExtendedQueues] | type[ClassicQueues]] = [ClassicQueues]
        if is_reader and not self._is_classic:
            kinds.insert(0, ExtendedQueues)
        failure: Exception | None = None
        for kind in kinds:
            try:
                return kind(self._api, self._context, self._domain, self.rail.port, packet_numbers,
                            is_reader=is_reader)
            except self._api.error as error:
                failure = error
                if getattr(error, "error_code", -1) in (errno.EOPNOTSUPP, errno.ENOSYS):
                    logger.info("%s has no extended queue pairs: reads cost more time in Python", self.rail.device)
        raise TransferFailed(f"cannot make {count} queue pairs on {self.rail.device}: {failure}", where="rdma",
                             hint="close other users of the device, or leave rdma out of `media`") from failure

    def close(self) -> None:
        """Close the port and what is left of it. Idempotent."""
        self._domain.close()
        self._context.close()


class VerbsRegistration:
    """Registered memory. Implements ``backend.Registration``; does not keep the memory alive."""

    def __init__(self, region: Any) -> None:
        self._region = region
        self.lkey, self.rkey = int(region.lkey), int(region.rkey)

    def close(self) -> None:
        """Deregister. Idempotent."""
        self._region.close()


class _Limit(NamedTuple):
    is_low: bool
    text: str


def explain_registration(code: int, size_bytes: int, text: str) -> TransferFailed:
    """Say why memory could not be registered; ``code`` is the errno that pyverbs reports."""
    if code == errno.ENOMEM:
        limit = _memlock(size_bytes)
        return TransferFailed(
            f"cannot pin {size_bytes >> 20} MiB: {limit.text}", where="rdma",
            hint="raise the limit: ulimit -l unlimited; docker --ulimit memlock=-1; systemd LimitMEMLOCK=infinity; "
                 "Kubernetes: the IPC_LOCK capability or the runtime's limit" if limit.is_low else
                 "the machine or the device is out of memory")
    if code == errno.EFAULT:
        return TransferFailed("the memory is not mapped, or not writable", where="rdma")
    return TransferFailed(f"cannot register {size_bytes} bytes: {text}", where="rdma")


def _memlock(size_bytes: int) -> _Limit:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return _Limit(False, "out of memory")
    # below the limit it may still be the sum of what is pinned already
    return _Limit(True, f"the locked-memory limit is {soft >> 10} KiB (ulimit -l)")
