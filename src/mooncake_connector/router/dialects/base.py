"""Define what the router must be told of an engine to use it.

Pure: no sockets, threads or clocks. Another engine is one more module beside this one, and a line in ``select.py``.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from mooncake_connector.router.bodies import Ask
from mooncake_connector.router.engines import Introduction
from mooncake_connector.router.messages import EngineKind, Placed


class Probe(NamedTuple):
    """An HTTP request that makes an engine tell who it is."""

    method: str
    path: str
    body: bytes | None = None


class StreamFailure(NamedTuple):
    """An error that an engine sent as the first event of a stream it had answered with 200."""

    status: int
    message: str


class Dialect(Protocol):
    """One engine's ways.

    Attributes:
        kind: its name.
        connector: what an engine must run with to take part in hand-overs.
        health_path: answers 200 when it can take requests, at once and without computing anything.
        recovers: whether a decode leg whose prefill leg failed computes the prompt itself. If not, both are sent anew.
        unsplittable: reasons to run a request whole (see ``bodies.read_ask``) for which no pair can do instead.
    """

    kind: EngineKind
    connector: str
    health_path: str
    recovers: bool
    unsplittable: frozenset[str]

    def probe(self, models: tuple[str, ...]) -> Probe:
        """Return what to ask an engine that serves ``models``, at least one."""

    def read_probe(self, answer: bytes, *, url: str, models: tuple[str, ...]) -> Introduction | None:
        """Return what the engine at ``url`` told; None when it makes no sense."""

    def pair(self, source: Introduction, transfer_id: str, placed: Placed) -> Placed:
        """Return ``placed`` with what both legs must carry, ``source`` being the prefill engine."""

    def prefill_body(self, ask: Ask, placed: Placed) -> bytes:
        """Return the body of the prefill leg."""

    def decode_body(self, ask: Ask, placed: Placed) -> bytes:
        """Return the body of the decode leg."""

    def stream_failure(self, first: bytes) -> StreamFailure | None:
        """Return the error that a stream begins with; None when it begins with an answer."""
