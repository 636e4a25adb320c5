"""Define what the demo must be told of an engine: how to start it, how to ask it, where its figures are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import aiohttp

from mooncake_connector.demo.client import Handoff
from mooncake_connector.demo.cluster import Cell, EngineOptions
from mooncake_connector.demo.processes import ProcessSpec

ServerName = Literal["prefill", "decode"]
Split = Callable[[Sequence[int]], Awaitable[Handoff]]


class Sources(NamedTuple):
    """Where an engine's prompt tokens came from: its own cache, the pool, or computation."""

    device: float
    pool: float
    computed: float

    @property
    def reused(self) -> float:
        """Return how many were not computed."""
        return self.device + self.pool


class Ways(Protocol):
    """One engine's ways.

    Attributes:
        name: as it is called on the command line.
    """

    name: str

    def options(self, python: str, model: str, *, dtype: str) -> EngineOptions:
        """Check an interpreter and a model folder and describe servers that use them.

        Raises:
            ConfigError: if either cannot be used; says what to do.
        """

    def version(self, python: str) -> str:
        """Return the engine's version."""

    def server(self, cell: Cell, name: ServerName) -> ProcessSpec:
        """Describe one of the cell's two servers."""

    def sources(self, metrics: dict[str, float]) -> Sources:
        """Return where prompt tokens came from, by a server's ``/metrics``."""

    def handoff_bytes(self, prefill: dict[str, float], members: dict[str, float]) -> dict[str, float]:
        """Return the bytes handed over by medium, by the prefill server's ``/metrics`` and the cell's members."""

    async def splitter(self, http: aiohttp.ClientSession, cell: Cell, *, max_tokens: int) -> Split:
        """Return what sends both legs of a prompt straight to the servers.

        Raises:
            AskFailed: if a server does not say where it hands over.
        """
