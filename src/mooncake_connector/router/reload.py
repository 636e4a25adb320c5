"""Notice that the configuration file changed, and use what it says now; if it cannot be used, keep what there is.

Threads: one asyncio loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mooncake_connector.router.config import RouterConfig
from mooncake_store.errors import ConfigError
from mooncake_store.metrics import Metrics

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


class _Stamp(NamedTuple):
    """What changes when a file does, also when another one takes its place."""

    inode: int
    size_bytes: int
    changed_ns: int


class ConfigFile:
    """Follows one file.

    Args:
        path: the file.
        load: reads it with everything that comes before it; raises ConfigError.
        use: takes the new settings; raises ConfigError when they cannot be changed while running.
        metrics: counts how it went.
    """

    def __init__(
        self,
        path: Path,
        *,
        load: Callable[[], RouterConfig],
        use: Callable[[RouterConfig], None],
        metrics: Metrics,
    ) -> None:
        self._path = path
        self._load = load
        self._use = use
        self._metrics = metrics
        self._stamp = _stamp_of(path)

    async def follow(self) -> None:
        """Look at the file every second, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            stamp = _stamp_of(self._path)
            if stamp != self._stamp:
                self._stamp = stamp
                self.reload()

    def reload(self) -> bool:
        """Read the file and use it; False when the old settings stay, and the log says why."""
        try:
            self._use(self._load())
        except ConfigError as error:
            where = f" ({error.where})" if error.where else ""
            log.error("%s is not used, the settings stay as they are: %s%s", self._path, error.message, where)
            self._metrics.add("mooncake_router_config_reloads_total", result="refused")
            return False
        log.info("%s was read again and is in use", self._path)
        self._metrics.add("mooncake_router_config_reloads_total", result="ok")
        return True


def _stamp_of(path: Path) -> _Stamp | None:
    try:
        status = os.stat(path)
    except OSError:
        return None  # being replaced, or gone: then loading says so
    return _Stamp(status.st_ino, status.st_size, status.st_mtime_ns)
