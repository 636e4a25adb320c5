"""Hold client requests until the scheduler says where each goes, and wake it when something may have changed.

Threads: one asyncio loop; never blocks.
"""

from __future__ import annotations

import asyncio
import heapq
from typing import NamedTuple

from mooncake_connector.router.admission import Rejected
from mooncake_connector.router.lessons import Lessons
from mooncake_connector.router.messages import Leg, Placed, Refused
from mooncake_connector.router.policy import Start
from mooncake_connector.router.scheduler import Action, Scheduler, Submission
from mooncake_store.metrics import Metrics


class Seat(NamedTuple):
    """Where a request goes, and what is expected of it.

    Attributes:
        start: its prefill as predicted; None when nothing can be said.
        ttft_s: predicted seconds from now to the first byte; 0 when nothing can be said.
    """

    placed: Placed
    start: Start | None = None
    ttft_s: float = 0.0

    @property
    def prefix_tokens(self) -> int:
        """Return how many leading tokens need not be computed, as predicted."""
        return self.start.prefix_tokens if self.start is not None else 0


class Dispatcher:
    """The running router's side of the scheduler.

    Args:
        scheduler: decides; nobody else may drive it.
        lessons: what was learned about delays.
        metrics: counts what is held and refused.
    """

    def __init__(self, scheduler: Scheduler, lessons: Lessons, metrics: Metrics) -> None:
        self.scheduler = scheduler
        self.placer = scheduler.placer
        self.lessons = lessons
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._held: dict[str, asyncio.Future[Action]] = {}
        self._expected: list[tuple[float, str]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._is_poll_due = False

    @property
    def num_held(self) -> int:
        """Return how many requests wait for an engine."""
        return len(self._held)

    def drain_s(self) -> float:
        """Return the predicted seconds until all that was asked for is prefilled."""
        queues_s = self.placer.backlog_s(now_ns=int(self._loop.time() * 1e9))
        return (sum(queues_s) + self.scheduler.queue.work_s) / max(len(queues_s), 1)

    def close(self) -> None:
        """Stop waking the scheduler. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def place(self, submission: Submission) -> Seat | Refused | Rejected:
        """Return where a request goes, when it is its turn; cancelling forgets the request."""
        request_id = submission.place.request_id
        arrived_s = self._loop.time()
        if self._expected:
            self._note_expected(arrived_s)
        mine: Action | None = None
        for action in self.scheduler.submit(submission, now_s=arrived_s):
            if _subject(action) == request_id:
                mine = action
            else:
                self._settle(action)
        self._metrics.observe("mooncake_router_decision_seconds", self._loop.time() - arrived_s)
        if mine is None:
            mine = await self._hold(request_id)
            self._metrics.observe("mooncake_router_held_seconds", self._loop.time() - arrived_s)
        return self._seat(mine)

    def place_again(self, submission: Submission) -> Seat | Refused:
        """Return where a request goes whose engine failed: it waited once already."""
        place, now_ns = submission.place, int(self._loop.time() * 1e9)
        choice = self.placer.propose(place, now_ns=now_ns, colocated_reason=submission.colocated_reason)
        if isinstance(choice, Refused):
            return choice
        placed = self.placer.commit(place, place.request_id, choice, now_ns=now_ns)
        return placed if isinstance(placed, Refused) else Seat(placed, choice.start, self.lessons.ttft_s(choice.start))

    def finish(self, transfer_id: str, leg: Leg = "both") -> bool:
        """Stop counting a leg's work, or both legs'; whoever waits may be next. False when it is not open."""
        is_open = self.placer.finish(transfer_id, leg, now_ns=int(self._loop.time() * 1e9))
        self.poke()
        return is_open

    def expect_prefilled(self, transfer_id: str, *, after_s: float) -> None:
        """Count a prefill as over after so long, because nobody will tell."""
        heapq.heappush(self._expected, (self._loop.time() + after_s, transfer_id))

    def _note_expected(self, now_s: float) -> None:
        while self._expected and self._expected[0][0] <= now_s:
            self.placer.finish(heapq.heappop(self._expected)[1], "prefill", now_ns=int(now_s * 1e9))

    def poke(self) -> None:
        """Ask the scheduler soon, because something changed."""
        if self._held and not self._is_poll_due:
            self._is_poll_due = True
            self._loop.call_soon(self._poll)

    async def _hold(self, request_id: str) -> Action:
        future: asyncio.Future[Action] = self._loop.create_future()
        self._held[request_id] = future
        self._arm()
        try:
            return await future
        except asyncio.CancelledError:
            self.scheduler.cancel(request_id, now_s=self._loop.time())
            self.poke()
            raise
        finally:
            del self._held[request_id]

    def _seat(self, action: Action) -> Seat | Refused | Rejected:
        if isinstance(action, Rejected):
            self._metrics.add("mooncake_router_rejected_total", reason=action.reason)
            return action
        if isinstance(action, Refused):
            return action
        if isinstance(action.placed, Refused):
            return action.placed
        start = action.choice.start
        return Seat(action.placed, start, self.lessons.ttft_s(start))

    def _settle(self, action: Action) -> None:
        future = self._held.get(_subject(action))
        # Done means that its client left in this very moment; then the one who waited for it cancels it.
        if future is not None and not future.done():
            future.set_result(action)

    def _poll(self) -> None:
        self._is_poll_due = False
        try:
            now_s = self._loop.time()
            self._note_expected(now_s)
            for action in self.scheduler.poll(now_s=now_s):
                self._settle(action)
        finally:  # whatever happens, those who wait must not wait for ever
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wake_s = self.scheduler.wake_s
        if wake_s is not None:
            self._timer = self._loop.call_at(wake_s, self._poll)


def _subject(action: Action) -> str:
    return action.subject if isinstance(action, Refused) else action.request_id
