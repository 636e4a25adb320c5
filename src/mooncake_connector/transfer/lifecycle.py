"""Decide what happens to a hand-over, on both sides.

Pure. Everything about transitions lives in this file, as two tables; neither knows sockets, threads or engines.

A transfer at the prefill side moves WANTED -> COMPUTING -> HELD -> GONE. Two things end it from outside and may come in
any order: the decode worker's Done, and the engine saying that the request finished. Blocks may go only when both are
there, or when the lease ends. The engine must be told exactly once that it may free (REPORT): it asserts on a second
time.

A transfer at the decode side moves ANNOUNCED -> WAITING -> READING -> ENDED or FAILED. The
engine must be told exactly once per parked request, also when the request was cancelled meanwhile.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from mooncake_store.errors import LocalProtocolError


class Held(enum.Enum):
    """States of a transfer at the prefill side."""

    WANTED = "wanted"        # a peer subscribed; the engine has not shown the request yet
    COMPUTING = "computing"  # the engine has the request
    HELD = "held"            # the request finished, its blocks wait for the peer
    DRAINED = "drained"      # the peer has all it wants, the request has not finished
    GONE = "gone"            # over; kept a while as a tombstone


class HeldEvent(enum.Enum):
    """What can happen to a transfer at the prefill side."""

    SUBSCRIBED = "subscribed"
    SCHEDULED = "scheduled"        # the engine admitted or continued the request
    PREEMPTED = "preempted"        # its blocks are about to be reused; it will be computed again
    FINISHED = "finished"          # the request ended well and the engine keeps its blocks for us
    ENDED_BADLY = "ended_badly"    # aborted or failed: the engine frees the blocks at once
    DONE = "done"                  # the peer is through
    EXPIRED = "expired"            # lease over, or the peer's process is gone


class Action(enum.Enum):
    """What the shell must do after a transition, in the order listed in the table."""

    PUBLISH = "publish"      # tell the subscriber how far we are
    REVOKE = "revoke"        # bump the epoch word: copies under way become void
    REPORT = "report"        # tell the engine that it may free the blocks
    TELL_ABORT = "tell_abort"  # tell the subscriber that nothing more will come


class HeldStep(NamedTuple):
    """One cell of the prefill side's table."""

    state: Held
    actions: tuple[Action, ...]


_W, _C, _H, _D, _G = Held.WANTED, Held.COMPUTING, Held.HELD, Held.DRAINED, Held.GONE
_E = HeldEvent
_PUBLISH, _REVOKE, _REPORT, _ABORT = Action.PUBLISH, Action.REVOKE, Action.REPORT, Action.TELL_ABORT

HELD_TABLE: dict[tuple[Held, HeldEvent], HeldStep] = {
    (_W, _E.SUBSCRIBED): HeldStep(_W, (_PUBLISH,)),
    (_W, _E.SCHEDULED): HeldStep(_C, (_PUBLISH,)),
    (_W, _E.PREEMPTED): HeldStep(_W, ()),
    (_W, _E.FINISHED): HeldStep(_H, ()),
    (_W, _E.ENDED_BADLY): HeldStep(_G, (_ABORT,)),
    (_W, _E.DONE): HeldStep(_G, ()),
    (_W, _E.EXPIRED): HeldStep(_G, (_ABORT,)),
    (_C, _E.SUBSCRIBED): HeldStep(_C, (_PUBLISH,)),
    (_C, _E.SCHEDULED): HeldStep(_C, (_PUBLISH,)),
    (_C, _E.PREEMPTED): HeldStep(_C, (_REVOKE,)),
    (_C, _E.FINISHED): HeldStep(_H, ()),
    (_C, _E.ENDED_BADLY): HeldStep(_G, (_REVOKE, _ABORT)),
    (_C, _E.DONE): HeldStep(_D, ()),
    (_C, _E.EXPIRED): HeldStep(_D, (_ABORT,)),
    (_H, _E.SUBSCRIBED): HeldStep(_H, (_PUBLISH,)),
    # The engine takes back what it had finished; vLLM never does.
    (_H, _E.ENDED_BADLY): HeldStep(_G, (_REVOKE, _REPORT, _ABORT)),
    (_H, _E.DONE): HeldStep(_G, (_REVOKE, _REPORT)),
    (_H, _E.EXPIRED): HeldStep(_G, (_REVOKE, _REPORT, _ABORT)),
    (_D, _E.SUBSCRIBED): HeldStep(_D, ()),
    (_D, _E.SCHEDULED): HeldStep(_D, ()),
    (_D, _E.PREEMPTED): HeldStep(_D, (_REVOKE,)),
    (_D, _E.FINISHED): HeldStep(_G, (_REVOKE, _REPORT)),
    (_D, _E.ENDED_BADLY): HeldStep(_G, (_REVOKE,)),
    (_D, _E.DONE): HeldStep(_D, ()),
    (_D, _E.EXPIRED): HeldStep(_D, ()),
    # A tombstone answers whoever comes late. FINISHED here: the peer gave up before the engine admitted the request.
    (_G, _E.SUBSCRIBED): HeldStep(_G, (_ABORT,)),
    (_G, _E.SCHEDULED): HeldStep(_G, ()),
    (_G, _E.PREEMPTED): HeldStep(_G, ()),
    (_G, _E.FINISHED): HeldStep(_G, (_REPORT,)),
    (_G, _E.ENDED_BADLY): HeldStep(_G, ()),
    (_G, _E.DONE): HeldStep(_G, ()),
    (_G, _E.EXPIRED): HeldStep(_G, ()),
}


def held_step(state: Held, event: HeldEvent) -> HeldStep:
    """Return the next state and what to do. Raises: LocalProtocolError for a pair the table forbids."""
    step = HELD_TABLE.get((state, event))
    if step is None:
        raise LocalProtocolError(f"transfer in state {state.value} cannot take {event.value}")
    return step


class Pull(enum.Enum):
    """States of a transfer at the decode side."""

    ANNOUNCED = "announced"  # subscribed ahead; the engine has given no blocks yet
    WAITING = "waiting"      # blocks are here, the prefill has shown nothing yet
    READING = "reading"      # some of it is here
    ENDED = "ended"          # every needed block is here
    FAILED = "failed"        # given up; the engine computes or fails the rest
    CANCELLED = "cancelled"  # the engine dropped the request


class PullEvent(enum.Enum):
    """What can happen to a transfer at the decode side."""

    STARTED = "started"      # the engine gave us blocks to fill
    PROGRESS = "progress"    # a copy arrived and its epoch still held
    COMPLETE = "complete"    # that copy was the last
    LOST = "lost"            # abort, refusal, dead peer, deadline
    CANCELLED = "cancelled"  # the engine dropped the request


class PullStep(NamedTuple):
    """One cell of the decode side's table.

    ``reports``: tell the engine now that the request's wait is over; ``releases``: tell the prefill that we are
    through.
    """

    state: Pull
    reports: bool
    releases: bool


_P = PullEvent
PULL_TABLE: dict[tuple[Pull, PullEvent], PullStep] = {
    (Pull.ANNOUNCED, _P.STARTED): PullStep(Pull.WAITING, reports=False, releases=False),
    # Lost before the engine gave blocks: nothing is parked, so nothing is reported. A later start subscribes anew, and
    # the prefill's tombstone or silence ends that.
    (Pull.ANNOUNCED, _P.LOST): PullStep(Pull.FAILED, reports=False, releases=True),
    (Pull.ANNOUNCED, _P.CANCELLED): PullStep(Pull.CANCELLED, reports=False, releases=True),
    (Pull.WAITING, _P.PROGRESS): PullStep(Pull.READING, reports=False, releases=False),
    (Pull.WAITING, _P.COMPLETE): PullStep(Pull.ENDED, reports=True, releases=True),
    (Pull.WAITING, _P.LOST): PullStep(Pull.FAILED, reports=True, releases=True),
    (Pull.WAITING, _P.CANCELLED): PullStep(Pull.CANCELLED, reports=True, releases=True),
    (Pull.READING, _P.PROGRESS): PullStep(Pull.READING, reports=False, releases=False),
    (Pull.READING, _P.COMPLETE): PullStep(Pull.ENDED, reports=True, releases=True),
    (Pull.READING, _P.LOST): PullStep(Pull.FAILED, reports=True, releases=True),
    (Pull.READING, _P.CANCELLED): PullStep(Pull.CANCELLED, reports=True, releases=True),
    (Pull.FAILED, _P.CANCELLED): PullStep(Pull.FAILED, reports=False, releases=False),
    (Pull.FAILED, _P.LOST): PullStep(Pull.FAILED, reports=False, releases=False),
    (Pull.ENDED, _P.CANCELLED): PullStep(Pull.ENDED, reports=False, releases=False),
    (Pull.ENDED, _P.LOST): PullStep(Pull.ENDED, reports=False, releases=False),
    (Pull.CANCELLED, _P.CANCELLED): PullStep(Pull.CANCELLED, reports=False, releases=False),
    (Pull.CANCELLED, _P.LOST): PullStep(Pull.CANCELLED, reports=False, releases=False),
}


def pull_step(state: Pull, event: PullEvent) -> PullStep:
    """Return the next state and what to do. Raises: LocalProtocolError for a pair the table forbids."""
    step = PULL_TABLE.get((state, event))
    if step is None:
        raise LocalProtocolError(f"pull in state {state.value} cannot take {event.value}")
    return step
