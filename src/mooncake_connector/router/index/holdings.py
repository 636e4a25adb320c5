"""Know what every engine holds, from its own events: the index, the streams that feed it, and its answers.

Pure: no sockets, threads or clocks. Not thread-safe; one owner. The shell that reads sockets is event_subscriber.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mooncake_connector.router.index.blocks import Blocks
from mooncake_connector.router.index.events import (
    END_NUMBER,
    Batch,
    Cleared,
    Dialect,
    Stored,
    decode_batch,
    split_frames,
)
from mooncake_connector.router.index.hashing import TokenHash, Tokens
from mooncake_connector.router.index.intake import Intake, Life
from mooncake_connector.router.index.lookup import Held, Prompt, find
from mooncake_connector.router.index.streams import FILL_TIMEOUT_NS, Apply, Ask, Clear, Sequencer
from mooncake_store.errors import CapacityExceeded, RemoteProtocolError

LORAS_MAX = 4096
_UNUSED = 1


class Source(NamedTuple):
    """One event stream: an engine and its data-parallel rank."""

    url: str
    rank: int = 0


class Answer(NamedTuple):
    """What is known of one prompt.

    Attributes:
        engines: per engine with a followed stream, what it holds: of several ranks, the one that holds most.
        pool: leading tokens in the pool.
    """

    engines: Mapping[str, Held]
    pool: int


class _Stream:
    """One followed stream.

    Attributes:
        is_partial: some of what the engine holds could not be indexed in this life.
        is_told: whether the sequencer was not stale when it was last looked at.
    """

    def __init__(self, dialect: Dialect, life: Life, fill_timeout_ns: int) -> None:
        self.dialect: Dialect = dialect
        self.sequencer: Sequencer[Batch] = Sequencer(fill_timeout_ns=fill_timeout_ns)
        self.life = life
        self.is_partial = False
        self.is_told = False


class Holdings:
    """Follows event streams and answers what their engines hold.

    Methods that take messages return the replay to ask for, if any; a new one replaces the one under way.

    Args:
        capacity: blocks that are kept at most, each engine's copy counted; their memory is taken with the first stream.
        secret: 16 to 64 random bytes, for the hash of tokens.
        fill_timeout_ns: how long missing batches are waited for.

    Attributes:
        counts: what happened, by kind: batches, blocks, orphans, cleared, malformed, ignored.
    """

    def __init__(self, capacity: int, *, secret: bytes, fill_timeout_ns: int = FILL_TIMEOUT_NS) -> None:
        self.blocks = Blocks(_UNUSED)
        self.counts: Counter[str] = Counter()
        self._capacity = capacity
        self._hash = TokenHash(secret)
        self._intake = Intake(self.blocks, self._hash)
        self._fill_timeout_ns = fill_timeout_ns
        self._streams: dict[Source, _Stream] = {}
        self._sources: dict[int, Source] = {}
        self._loras: set[str] = set()
        self._told: frozenset[str] | None = None

    # ------------------------------------------------------------------ questions

    def prompt(self, tokens: Tokens, *, model: str = "", salt: str = "") -> Prompt:
        """Return a prompt, hashed at its first lookup; keep it as long as the request waits.

        Args:
            tokens: token ids, see :func:`~mooncake_connector.router.index.hashing.pack_tokens`.
            model: as the client named it: it scopes the prompt if an engine told of a LoRA adapter of this name.
            salt: the client's cache salt.
        """
        return Prompt(self._hash, tokens, self._hash.scope(model if model in self._loras else "", salt))

    def match(self, prompt: Prompt) -> Answer:
        """Return what every followed engine holds of a prompt, as of the last :meth:`flush`."""
        found = find(self.blocks, prompt)
        engines: dict[str, Held] = {}
        for stream, held in found.streams.items():
            source = self._sources.get(stream)
            if source is not None and (source.url not in engines or held > engines[source.url]):
                engines[source.url] = held
        return Answer(engines, found.pool)

    def sources(self) -> Sequence[Source]:
        """Return the streams that are followed."""
        return tuple(self._streams)

    def is_stale(self, source: Source) -> bool:
        """Tell whether a stream's engine may hold something else than is known."""
        stream = self._streams.get(source)
        return stream is None or stream.is_partial or stream.sequencer.is_stale

    @property
    def told(self) -> frozenset[str]:
        """Return the engines that are known by their events: all of their streams are followed, and none is stale."""
        if self._told is None:
            stale = {source.url for source in self._streams if self.is_stale(source)}
            self._told = frozenset(source.url for source in self._streams) - stale
        return self._told

    @property
    def num_stale(self) -> int:
        """Return how many streams are stale."""
        return sum(map(self.is_stale, self._streams))

    # ------------------------------------------------------------------ streams

    def add(self, source: Source, dialect: Dialect = "vllm") -> None:
        """Follow a stream; one that is followed already is left as it is.

        Raises:
            CapacityExceeded: when there are too many.
        """
        if not self._streams and self.blocks.num_wanted == _UNUSED:
            self.blocks = Blocks(self._capacity)
            self._intake = Intake(self.blocks, self._hash)
        if source not in self._streams:
            stream = self._streams[source] = _Stream(dialect, self._intake.open(), self._fill_timeout_ns)
            self._sources[stream.life.stream] = source
            self._told = None

    def remove(self, source: Source) -> None:
        """Follow a stream no longer, and forget what its engine holds."""
        stream = self._streams.pop(source, None)
        if stream is not None:
            del self._sources[stream.life.stream]
            self._intake.close(stream.life)
            self._told = None

    def on_connected(self, source: Source, *, now_ns: int) -> Ask | None:
        """The stream's live socket was connected, for the first time or again."""
        stream = self._streams.get(source)
        return None if stream is None else self._carry_out(source, stream, stream.sequencer.on_connected(now_ns=now_ns))

    def on_renewed(self, url: str) -> None:
        """An engine is a new process: its caches are empty."""
        for source, stream in self._streams.items():
            if source.url == url:
                self._carry_out(source, stream, stream.sequencer.on_renewed())

    def on_message(self, source: Source, frames: Sequence[bytes], *, is_replay: bool, now_ns: int) -> Ask | None:
        """Take a message from the live or the replay socket.

        Raises:
            RemoteProtocolError: when it is malformed; if it was a batch, the stream counts as having lost it.
        """
        stream = self._streams.get(source)
        if stream is None:
            return None
        number, payload = split_frames(frames)
        if number == END_NUMBER:
            steps = stream.sequencer.on_replay_end(now_ns=now_ns) if is_replay else []
            return self._carry_out(source, stream, steps)
        try:
            batch = decode_batch(payload, stream.dialect)
        except RemoteProtocolError:
            self.counts["malformed"] += 1
            self._carry_out(source, stream, stream.sequencer.on_unreadable(number, now_ns=now_ns))
            raise
        if batch.num_ignored:
            self.counts["ignored"] += batch.num_ignored
        take = stream.sequencer.on_replayed if is_replay else stream.sequencer.on_live
        return self._carry_out(source, stream, take(number, batch.time_s, batch, now_ns=now_ns))

    def on_time(self, *, now_ns: int) -> list[tuple[Source, Ask]]:
        """Give up what did not come in time; call it some times a second."""
        asks = []
        for source, stream in self._streams.items():
            if stream.sequencer.deadline_ns and now_ns >= stream.sequencer.deadline_ns:
                ask = self._carry_out(source, stream, stream.sequencer.on_time(now_ns=now_ns))
                if ask is not None:
                    asks.append((source, ask))
        for number in self.blocks.take_evicted():
            evicted = self._sources.get(number)
            if evicted is not None:
                self._streams[evicted].is_partial = True
                self._told = None
        return asks

    @property
    def num_gathered(self) -> int:
        """Return how many blocks wait for :meth:`flush`."""
        return self._intake.num_gathered

    def flush(self) -> None:
        """Carry out what was gathered, so that it counts in answers."""
        self._intake.flush()

    # ------------------------------------------------------------------

    def _carry_out(self, source: Source, stream: _Stream, steps: Sequence[Apply[Batch] | Clear | Ask]) -> Ask | None:
        ask = None
        for step in steps:
            if isinstance(step, Apply):
                self._apply(source, stream, step.batch)
            elif isinstance(step, Clear):
                self.counts["cleared"] += 1
                self._clear(source, stream)
            else:
                ask = step
        if stream.is_told is stream.sequencer.is_stale:
            stream.is_told = not stream.is_told
            self._told = None
        return ask

    def _apply(self, source: Source, stream: _Stream, batch: Batch) -> None:
        self.counts["batches"] += 1
        for event in batch.events:
            if isinstance(event, Stored):
                self._store(stream, event)
            elif isinstance(event, Cleared):
                self._clear(source, stream)
                stream.sequencer.note_cleared()
            else:
                self._intake.remove(stream.life, event)

    def _store(self, stream: _Stream, event: Stored) -> None:
        self.counts["blocks"] += len(event.hashes)
        if event.lora and len(self._loras) < LORAS_MAX:
            self._loras.add(event.lora)
        try:
            is_placed = self._intake.store(stream.life, event)
        except CapacityExceeded:
            is_placed = False
        if not is_placed:
            self.counts["orphans"] += len(event.hashes)
            stream.is_partial = True
            self._told = None

    def _clear(self, source: Source, stream: _Stream) -> None:
        """Begin a new life, with nothing held."""
        del self._sources[stream.life.stream]
        self._intake.close(stream.life)
        stream.life = self._intake.open()
        stream.is_partial = False
        self._told = None
        self._sources[stream.life.stream] = source
