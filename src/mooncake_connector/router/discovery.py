"""Find engines in the cell: those whose membership says where their HTTP server is.

Threads: one asyncio loop; the directory has threads of its own. A directory that is out of reach changes nothing: what
was found stays, and the health checks go on.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterable
from typing import cast, get_args

from mooncake_connector.router.config import RouterConfig
from mooncake_connector.router.messages import URL_MAX_CHARS, Role
from mooncake_connector.router.watch import EngineWatch
from mooncake_store.config import StoreConfig
from mooncake_store.directory.base import Directory
from mooncake_store.directory.open import open_directory
from mooncake_store.errors import CapacityExceeded
from mooncake_store.metrics import Metrics
from mooncake_store.types import Member

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
_URL = re.compile(r"https?://[^\s/]+")


def engines_of(members: Iterable[Member]) -> dict[str, Role]:
    """Return url -> role of the engines among a cell's members; what makes no sense is left out.

    An engine has as many members as it has workers, and all of them say the same.
    """
    found: dict[str, Role] = {}
    for member in members:
        role, _, url = member.about.partition(" ")
        url = url.rstrip("/")
        if role in get_args(Role) and len(url) <= URL_MAX_CHARS and _URL.fullmatch(url):
            found[url] = cast(Role, role)
    return found


class Discovery:
    """Keeps the watched engines as the directory has them.

    Args:
        watch: takes and gives up engines.
        directory: the cell; closed by ``close``.
        kept: urls that were given by hand and are not ours to change.
    """

    def __init__(self, watch: EngineWatch, directory: Directory, *, kept: Iterable[str]) -> None:
        self._watch = watch
        self._directory = directory
        self._kept = set(kept)
        self._found: dict[str, Role] = {}

    def keep(self, urls: Iterable[str]) -> None:
        """Leave these engines alone from now on: they are given by hand."""
        self._kept = set(urls)
        for url in self._kept:
            self._found.pop(url, None)

    async def follow(self) -> None:
        """Look at the members twice a second, until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_EVERY_S)

    def look(self) -> None:
        """Take up what is new and give up what left."""
        engines = engines_of(self._directory.members().values())
        for url in [each for each in self._found if each not in engines]:
            del self._found[url]
            log.info("engine %s left the cell", url)
            self._watch.remove(url)
        for url, role in engines.items():
            if url in self._kept or self._found.get(url) == role:
                continue
            try:
                self._watch.add(url, role)
            except CapacityExceeded as error:
                log.warning("engine %s of the cell is not used: %s", url, error.message)
                continue
            self._found[url] = role
            log.info("engine %s (%s) is in the cell", url, role)

    def close(self) -> None:
        """Let go of the directory."""
        self._directory.close()


async def open_cell(config: RouterConfig, metrics: Metrics) -> Directory:
    """Return the directory of the cell that engines announce themselves in; it need not be reachable yet.

    Raises:
        ConfigError: the address or the cell's name cannot be used.
    """
    store = StoreConfig(directory=config.directory, cell=config.cell)
    return await asyncio.to_thread(open_directory, store, metrics)
