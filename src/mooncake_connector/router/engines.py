"""Keep the table of engines: what each is, whether it can be used, and how much work it has.

Pure: no sockets, threads or clocks. Not thread-safe; one owner.

Vocabulary: an engine is *introduced* once it told its models and where its workers' KV can be pulled; it is *up* once a
health check has confirmed it after that. One failure makes it *suspect*: still usable when nothing else is, and asked
to introduce itself anew, because what answers next may be another process. A *down* engine gets nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator
from typing import Literal, NamedTuple

import msgspec

from mooncake_connector.router.index.endpoints import EventSockets
from mooncake_connector.router.messages import EngineKind, Role
from mooncake_store.errors import CapacityExceeded, LocalProtocolError

Half = Literal["", "prefill", "decode"]

ENGINES_MAX = 1024
REPORT_FRESH_NS = 2_000_000_000


class EngineState(enum.Enum):
    """Whether an engine can be used."""

    # Members are unique: their identity will do, and an enum's own hash costs more than all the rest of a lookup.
    __hash__ = object.__hash__

    UNKNOWN = "unknown"
    INTRODUCED = "introduced"
    UP = "up"
    SUSPECT = "suspect"
    DOWN = "down"


class EngineEvent(enum.Enum):
    """What was seen of an engine.

    FAILED is one failed check or leg; LOST is a refused connection or several failures in a row.
    """

    INTRODUCED = "introduced"
    HEALTHY = "healthy"
    FAILED = "failed"
    LOST = "lost"


_S, _E = EngineState, EngineEvent
TRANSITIONS: dict[EngineState, dict[EngineEvent, EngineState]] = {
    _S.UNKNOWN: {
        _E.INTRODUCED: _S.INTRODUCED,
        _E.HEALTHY: _S.UNKNOWN,
        _E.FAILED: _S.UNKNOWN,
        _E.LOST: _S.UNKNOWN,
    },
    _S.INTRODUCED: {_E.INTRODUCED: _S.INTRODUCED, _E.HEALTHY: _S.UP, _E.FAILED: _S.SUSPECT, _E.LOST: _S.DOWN},
    _S.UP: {_E.INTRODUCED: _S.UP, _E.HEALTHY: _S.UP, _E.FAILED: _S.SUSPECT, _E.LOST: _S.DOWN},
    _S.SUSPECT: {
        _E.INTRODUCED: _S.INTRODUCED,
        _E.HEALTHY: _S.SUSPECT,
        _E.FAILED: _S.SUSPECT,
        _E.LOST: _S.DOWN,
    },
    _S.DOWN: {_E.INTRODUCED: _S.INTRODUCED, _E.HEALTHY: _S.DOWN, _E.FAILED: _S.DOWN, _E.LOST: _S.DOWN},
}
"""State and event -> next state; every pair is listed."""

PREFERENCE = {EngineState.UP: 0, EngineState.INTRODUCED: 1, EngineState.SUSPECT: 2}
"""Usable states, best first."""


class Introduction(msgspec.Struct, frozen=True):
    """What an engine told of itself.

    Attributes:
        models: names it serves, LoRA adapters included.
        engine_id: names one life of the engine; empty when it runs without our connector.
        addresses: where its workers hand over KV, one per TP rank; empty without our connector.
        kind: whose engine it is; both engines of a hand-over are of one kind.
        half: the only leg it can serve, as SGLang's prefill and decode servers; empty when it can run whole requests.
        events: where it publishes what it caches; None when it does not say.
    """

    models: tuple[str, ...]
    engine_id: str = ""
    addresses: tuple[str, ...] = ()
    kind: EngineKind = "vllm"
    half: Half = ""
    events: EventSockets | None = None

    @property
    def has_connector(self) -> bool:
        """Tell whether it can take part in a hand-over."""
        return bool(self.half or (self.engine_id and self.addresses))


class Engine(msgspec.Struct):
    """One row of the table. Changed only by :class:`EngineTable` and the placer.

    Attributes:
        prefill_tokens, decode_tokens: work that we placed and that is not finished.
        num_open: legs that we placed and that are not finished.
        num_placed: legs ever placed; breaks ties between idle engines.
        reported_tokens, reported_at_ns: what the engine itself reported last, and when (monotonic).
        reported_queue_s, reported_context_tokens: what that means for a prefill there, and for decoding.
        capacity_tokens: KV memory for running requests; 0 when unknown.
        is_draining: it gets nothing new, whatever its state.
    """

    url: str
    role: Role
    state: EngineState = EngineState.UNKNOWN
    introduction: Introduction | None = None
    prefill_tokens: int = 0
    decode_tokens: int = 0
    num_open: int = 0
    num_placed: int = 0
    reported_tokens: int = 0
    reported_at_ns: int = 0
    reported_queue_s: float = 0.0
    reported_context_tokens: int = 0
    capacity_tokens: int = 0
    is_draining: bool = False

    def outstanding_tokens(self, now_ns: int) -> int:
        """Return its unfinished work: ours, or its own fresh report when that is more (others use it too)."""
        placed = self.prefill_tokens + self.decode_tokens
        return max(placed, self.reported_tokens) if self.has_fresh_report(now_ns) else placed

    def has_fresh_report(self, now_ns: int) -> bool:
        """Tell whether what it reported last still counts."""
        return bool(self.reported_at_ns) and now_ns - self.reported_at_ns <= REPORT_FRESH_NS

    @property
    def is_usable(self) -> bool:
        """Tell whether a request may be sent to it at all."""
        return self.introduction is not None and self.state in PREFERENCE and not self.is_draining

    @property
    def has_connector(self) -> bool:
        """Tell whether it can take part in a hand-over."""
        return self.introduction is not None and self.introduction.has_connector

    @property
    def kind(self) -> EngineKind:
        """Return whose engine it is, as far as it told."""
        return self.introduction.kind if self.introduction is not None else "vllm"

    @property
    def runs_whole(self) -> bool:
        """Tell whether it can run a request without another engine."""
        return self.introduction is None or not self.introduction.half

    def serves(self, model: str) -> bool:
        """Tell whether it serves a model; every engine serves the empty name."""
        return not model or (self.introduction is not None and model in self.introduction.models)


class Transition(NamedTuple):
    """What an event did to an engine."""

    before: EngineState
    after: EngineState

    @property
    def is_change(self) -> bool:
        """Tell whether the state is another one."""
        return self.before is not self.after


class EngineTable:
    """Keeps every engine we know, by url. ``version`` grows with every change of who may do what."""

    def __init__(self) -> None:
        self._engines: dict[str, Engine] = {}
        self.version = 0

    def __iter__(self) -> Iterator[Engine]:
        return iter(tuple(self._engines.values()))

    def __len__(self) -> int:
        return len(self._engines)

    def get(self, url: str) -> Engine | None:
        """Return the engine, or None."""
        return self._engines.get(url)

    def add(self, url: str, role: Role) -> Engine:
        """Return the engine with this url, new or known; a known one takes the new role, if it can serve it.

        Raises:
            CapacityExceeded: when the table is full.
        """
        engine = self._engines.get(url)
        if engine is None:
            if len(self._engines) >= ENGINES_MAX:
                raise CapacityExceeded(f"{ENGINES_MAX} engines are registered", hint="unregister some")
            engine = self._engines[url] = Engine(url=url, role=role)
        engine.role = (engine.introduction.half if engine.introduction else "") or role
        self.version += 1
        return engine

    def remove(self, url: str) -> bool:
        """Forget an engine; False when it is not known."""
        self.version += 1
        return self._engines.pop(url, None) is not None

    def drain(self, urls: Collection[str]) -> None:
        """Give these engines nothing new, and all others something again."""
        for engine in self._engines.values():
            engine.is_draining = engine.url in urls
        self.version += 1

    def observe(self, url: str, event: EngineEvent) -> Transition | None:
        """Apply what was seen; None when the engine is not known (any more).

        Raises:
            LocalProtocolError: for INTRODUCED, which comes with an introduction: use :meth:`introduce`.
        """
        if event is EngineEvent.INTRODUCED:
            raise LocalProtocolError("an introduction must come through introduce()")
        return self._apply(url, event)

    def introduce(self, url: str, introduction: Introduction) -> bool:
        """Keep what an engine told; True when it is another process than before (its cache is empty)."""
        engine = self._engines.get(url)
        if engine is None:
            return False
        previous = engine.introduction
        engine.introduction = introduction
        engine.role = introduction.half or engine.role
        self._apply(url, EngineEvent.INTRODUCED)
        return previous is not None and previous.engine_id != introduction.engine_id

    def report(
        self, url: str, *, tokens: int, now_ns: int, queue_s: float = 0.0, context_tokens: int = 0
    ) -> bool:
        """Keep an engine's own report of its work; False when it is not known."""
        engine = self._engines.get(url)
        if engine is None:
            return False
        engine.reported_tokens = tokens
        engine.reported_at_ns = now_ns
        engine.reported_queue_s = queue_s
        engine.reported_context_tokens = context_tokens
        return True

    def count(self) -> dict[EngineState, int]:
        """Return how many engines are in each state; every state is listed."""
        counts = dict.fromkeys(EngineState, 0)
        for engine in self._engines.values():
            counts[engine.state] += 1
        return counts

    def _apply(self, url: str, event: EngineEvent) -> Transition | None:
        engine = self._engines.get(url)
        if engine is None:
            return None
        before = engine.state
        engine.state = TRANSITIONS[before][event]
        self.version += 1
        return Transition(before, engine.state)
