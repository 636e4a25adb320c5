"""Keep one engine's event stream in order, and know whether anything of it was missed.

Pure: no sockets, threads or clocks. Not thread-safe; one owner.

A publisher numbers its batches from 0 and starts again when its process does. What the network and a restart can do to
that: batches missing, twice, or in another order; numbers that begin anew. Missing ones are asked of the publisher's
replay socket, and later ones held meanwhile. What cannot be filled is given up: everything known of the stream is
cleared, and it is *stale* (it may hold more than we know) until it tells that its cache is empty.

A batch is recognised by its number and the engine's clock: the same number at another time is another life. The clock
of one life must not go back by more than it takes to see a restart, or a restart is taken for repetition.
"""

from __future__ import annotations

import enum
import math
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

HELD_MAX = 4096
RECENT_MAX = 256
FILL_TIMEOUT_NS = 2_000_000_000


class State(enum.Enum):
    """How far a stream is known."""

    # Members are unique: their identity will do, and an enum's own hash costs more than all the rest of a lookup.
    __hash__ = object.__hash__

    EMPTY = "empty"
    LIVE = "live"
    FILLING = "filling"


class Seen(enum.Enum):
    """What happened to a stream.

    NEXT: the batch that follows. OLD: one that was applied. AHEAD: one, while others are missing. REBORN: one of a new
    process. CONNECTED: perhaps batches were missed without a sign. FILLED: nothing is missing. GIVEN_UP: what is
    missing will not come. RENEWED: somebody else says that the process is a new one.
    """

    __hash__ = object.__hash__

    NEXT = "next"
    OLD = "old"
    AHEAD = "ahead"
    REBORN = "reborn"
    CONNECTED = "connected"
    FILLED = "filled"
    GIVEN_UP = "given up"
    RENEWED = "renewed"


class Do(enum.Enum):
    """What to do about it.

    APPLY the batch and those held that follow. HOLD it. ASK for what is missing. FORGET everything. SKIP to what is
    held. AGAIN: look at the batch anew, as the first one of a life.
    """

    APPLY = "apply"
    HOLD = "hold"
    ASK = "ask"
    FORGET = "forget"
    SKIP = "skip"
    AGAIN = "again"


_S, _E, _D = State, Seen, Do
TRANSITIONS: dict[State, dict[Seen, tuple[State, tuple[Do, ...]]]] = {
    _S.EMPTY: {
        _E.NEXT: (_S.LIVE, (_D.APPLY,)),
        _E.OLD: (_S.EMPTY, ()),
        _E.AHEAD: (_S.FILLING, (_D.HOLD, _D.ASK)),
        _E.REBORN: (_S.EMPTY, (_D.FORGET, _D.AGAIN)),
        _E.CONNECTED: (_S.FILLING, (_D.ASK,)),
        _E.FILLED: (_S.EMPTY, ()),
        _E.GIVEN_UP: (_S.EMPTY, ()),
        _E.RENEWED: (_S.EMPTY, (_D.FORGET,)),
    },
    _S.LIVE: {
        _E.NEXT: (_S.LIVE, (_D.APPLY,)),
        _E.OLD: (_S.LIVE, ()),
        _E.AHEAD: (_S.FILLING, (_D.HOLD, _D.ASK)),
        _E.REBORN: (_S.EMPTY, (_D.FORGET, _D.AGAIN)),
        _E.CONNECTED: (_S.FILLING, (_D.ASK,)),
        _E.FILLED: (_S.LIVE, ()),
        _E.GIVEN_UP: (_S.LIVE, (_D.SKIP,)),
        _E.RENEWED: (_S.EMPTY, (_D.FORGET,)),
    },
    _S.FILLING: {
        _E.NEXT: (_S.FILLING, (_D.APPLY,)),
        _E.OLD: (_S.FILLING, ()),
        _E.AHEAD: (_S.FILLING, (_D.HOLD,)),
        _E.REBORN: (_S.EMPTY, (_D.FORGET, _D.AGAIN)),
        _E.CONNECTED: (_S.FILLING, (_D.ASK,)),
        _E.FILLED: (_S.LIVE, ()),
        _E.GIVEN_UP: (_S.LIVE, (_D.SKIP,)),
        _E.RENEWED: (_S.EMPTY, (_D.FORGET,)),
    },
}
"""State and what was seen -> next state and what to do, in this order; every pair is listed."""


class Apply(NamedTuple, Generic[T]):
    """Carry out a batch."""

    batch: T


class Clear(NamedTuple):
    """Forget all that the stream holds."""


class Ask(NamedTuple):
    """Ask the publisher for its batches from ``first`` on."""

    first: int


class _Held(NamedTuple, Generic[T]):
    time_s: float
    batch: T


class Sequencer(Generic[T]):
    """Orders the batches of one stream.

    Methods return what to do, in order: :class:`Apply`, :class:`Clear`, :class:`Ask`.

    Attributes:
        state: how far the stream is known.
        next_number: what comes next; 0 when nothing was applied in this life.
        num_lost: how often something was given up.
    """

    def __init__(self, *, fill_timeout_ns: int = FILL_TIMEOUT_NS) -> None:
        self.state = State.EMPTY
        self.next_number = 0
        self.num_lost = 0
        self._fill_timeout_ns = fill_timeout_ns
        self._is_whole = False
        # After a connection: the replay is to be seen to its end, and to begin with the batch that we know.
        self._is_checking = False
        self._unconfirmed: int | None = None
        self._has_progressed = False
        self._deadline_ns = 0
        self._now_ns = 0
        self._last_time_s = 0.0
        self._recent: dict[int, float] = {}
        self._held: dict[int, _Held[T]] = {}
        self._steps: list[Apply[T] | Clear | Ask] = []

    @property
    def is_stale(self) -> bool:
        """Tell whether the engine may hold something else than what was applied."""
        return self.state is not State.LIVE or not self._is_whole

    @property
    def deadline_ns(self) -> int:
        """Return when to call :meth:`on_time`; 0 for never."""
        return self._deadline_ns if self.state is State.FILLING else 0

    def on_live(self, number: int, time_s: float, batch: T, *, now_ns: int) -> list[Apply[T] | Clear | Ask]:
        """Take a batch from the live socket."""
        self._now_ns = now_ns
        if self.state is State.LIVE and number == self.next_number:
            # What the table says of NEXT, for the case that is all but every one.
            self._apply(number, time_s, batch)
            return self._take_steps()
        self._see(self._classify(number, time_s), number, _Held(time_s, batch))
        if self.state is State.FILLING and len(self._held) > HELD_MAX:
            self._see(Seen.GIVEN_UP)
        return self._take_steps()

    def on_replayed(self, number: int, time_s: float, batch: T, *, now_ns: int) -> list[Apply[T] | Clear | Ask]:
        """Take a batch from the replay socket, which sends them in order: what it leaves out is gone.

        Batches of a replay that was asked for before the last :class:`Ask` must not come here.
        """
        self._now_ns = now_ns
        if self._unconfirmed is not None and number > self._unconfirmed:
            # The batch that we know is gone, so nothing says that this is still the same life.
            self._lose(number)
        seen = self._classify(number, time_s)
        if seen is Seen.OLD and number == self._unconfirmed:
            self._unconfirmed = None
        self._see(seen, number, _Held(time_s, batch))
        if seen is Seen.AHEAD and self.state is State.FILLING:
            self._see(Seen.GIVEN_UP)
        return self._take_steps()

    def on_replay_end(self, *, now_ns: int) -> list[Apply[T] | Clear | Ask]:
        """The publisher sent all that it has."""
        self._now_ns = now_ns
        if self.state is State.FILLING:
            self._is_checking = False
            if self._unconfirmed is not None:
                # It does not have the batch that we know: it is not the one that sent it.
                self._see(Seen.RENEWED)
                self._see(Seen.CONNECTED)
            elif self._held:
                self._see(Seen.CONNECTED if self._has_progressed else Seen.GIVEN_UP)
            else:
                self._see(Seen.FILLED)
        return self._take_steps()

    def on_time(self, *, now_ns: int) -> list[Apply[T] | Clear | Ask]:
        """Give up what did not come in time."""
        self._now_ns = now_ns
        if self.state is State.FILLING and now_ns >= self._deadline_ns:
            self._see(Seen.GIVEN_UP)
        return self._take_steps()

    def on_connected(self, *, now_ns: int) -> list[Apply[T] | Clear | Ask]:
        """The live socket was connected, for the first time or again: ask what was missed."""
        self._now_ns = now_ns
        self._see(Seen.CONNECTED)
        return self._take_steps()

    def on_renewed(self) -> list[Apply[T] | Clear | Ask]:
        """Somebody else says that the engine is a new process."""
        self._see(Seen.RENEWED)
        return self._take_steps()

    def on_unreadable(self, number: int, *, now_ns: int) -> list[Apply[T] | Clear | Ask]:
        """A batch came that cannot be read: it is as good as lost, now and in every replay."""
        self._now_ns = now_ns
        self._lose(max(number + 1, self.next_number))
        # Nobody knows how late it was: until the next one, an earlier number is not a sign of another life.
        self._last_time_s = math.inf
        self.state = State.LIVE
        self._drain()
        self._settle()
        return self._take_steps()

    def note_cleared(self) -> None:
        """A batch that was applied told that the cache is empty: nothing is unknown any more."""
        self._is_whole = True

    # ------------------------------------------------------------------

    def _classify(self, number: int, time_s: float) -> Seen:
        if number >= self.next_number:
            held = self._held.get(number)
            if held is not None:
                return Seen.OLD if held.time_s == time_s else Seen.REBORN
            if any(later > number and each.time_s < time_s for later, each in self._held.items()):
                return Seen.REBORN
            return Seen.NEXT if number == self.next_number else Seen.AHEAD
        known = self._recent.get(number)
        if known is not None:
            return Seen.OLD if known == time_s else Seen.REBORN
        return Seen.REBORN if time_s > self._last_time_s else Seen.OLD

    def _see(self, seen: Seen, number: int = 0, held: _Held[T] | None = None) -> None:
        before = self.state
        self.state, actions = TRANSITIONS[before][seen]
        for action in actions:
            if action is Do.FORGET:
                self._forget()
            elif action is Do.ASK:
                self._ask(is_checking=seen is Seen.CONNECTED)
            elif action is Do.SKIP:
                self._skip()
            elif held is None:
                continue
            elif action is Do.APPLY:
                self._apply(number, held.time_s, held.batch)
                self._drain()
            elif action is Do.HOLD:
                self._held[number] = held
            elif action is Do.AGAIN:
                self._see(Seen.NEXT if number == 0 else Seen.AHEAD, number, held)
        self._settle()

    def _settle(self) -> None:
        """Be filling exactly while something is missing or may be, and empty while nothing was ever applied."""
        is_filling = bool(self._held) or self._is_checking
        if is_filling and self.state is not State.FILLING:
            self._deadline_ns = self._now_ns + self._fill_timeout_ns
        self.state = State.FILLING if is_filling else State.LIVE if self.next_number else State.EMPTY

    def _ask(self, *, is_checking: bool) -> None:
        self._is_checking = is_checking
        self._unconfirmed = self.next_number - 1 if is_checking and self.next_number else None
        self._has_progressed = False
        self._deadline_ns = self._now_ns + self._fill_timeout_ns
        self._steps.append(Ask(self.next_number if self._unconfirmed is None else self._unconfirmed))

    def _skip(self) -> None:
        """Give up what is missing, if anything was ever there."""
        if self._held or self.next_number:
            self._lose(min(self._held, default=self.next_number))
            self._drain()
        self._is_checking = False

    def _forget(self) -> None:
        self._steps.append(Clear())
        self._held.clear()
        self._recent.clear()
        self.next_number = 0
        self._last_time_s = 0.0
        self._is_whole = False
        self._is_checking = False
        self._unconfirmed = None

    def _lose(self, next_number: int) -> None:
        """Go on at another place: what was known may have been removed in between."""
        self._steps.append(Clear())
        self.num_lost += 1
        self._is_whole = False
        self._unconfirmed = None
        self.next_number = next_number
        for number in [each for each in self._held if each < next_number]:
            del self._held[number]
        for number in [each for each in self._recent if each >= next_number]:
            del self._recent[number]

    def _apply(self, number: int, time_s: float, batch: T) -> None:
        if number == 0:
            self._is_whole = True
        self._steps.append(Apply(batch))
        self._recent[number] = time_s
        if len(self._recent) > RECENT_MAX:
            del self._recent[next(iter(self._recent))]
        self._last_time_s = time_s
        self.next_number = number + 1
        self._has_progressed = True
        self._deadline_ns = self._now_ns + self._fill_timeout_ns

    def _drain(self) -> None:
        while (held := self._held.pop(self.next_number, None)) is not None:
            self._apply(self.next_number, held.time_s, held.batch)

    def _take_steps(self) -> list[Apply[T] | Clear | Ask]:
        steps, self._steps = self._steps, []
        return steps
