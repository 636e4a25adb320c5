"""Model engines and their network: how long things really take, as opposed to what the router predicts.

Pure: no sockets, threads or clocks.

A prefill engine serves one request at a time, first come, first served. A decode engine batches continuously: all
running requests advance together, one token per step; a request waits, first come, first served, until its KV fits.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import Annotated, NamedTuple

import msgspec

from mooncake_connector.router.predictor import PREFILL_PRIOR, STEP_PRIOR

Positive = Annotated[float, msgspec.Meta(gt=0)]


class ClusterSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster to simulate; the defaults are the published model of Llama2-70B on eight A800 per engine.

    Attributes:
        num_prefill, num_decode: engines of either kind.
        cache_tokens: prefix cache of each prefill engine.
        decode_tokens: KV memory of each decode engine.
        link_bytes_per_s: network of each engine, each way.
        kv_token_bytes: KV of one token.
        has_pool: whether engines can fetch prefixes from each other.
        noise: standard deviation of the logarithm of actual over modelled prefill time.
        prefill: seconds of a prefill: once, per computed token, per pair of tokens, per token loaded from cache.
        step: seconds of a decode step: once, per request, per token of context.
    """

    num_prefill: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 8
    num_decode: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 8
    cache_tokens: Annotated[int, msgspec.Meta(ge=0)] = 3_000_000
    decode_tokens: Annotated[int, msgspec.Meta(ge=1)] = 1_300_000
    link_bytes_per_s: Positive = 87e9
    kv_token_bytes: Positive = 320e3
    has_pool: bool = True
    noise: Annotated[float, msgspec.Meta(ge=0, le=2)] = 0.15
    prefill: tuple[Positive, Positive, Positive, Positive] = PREFILL_PRIOR
    step: tuple[Positive, Positive, Positive] = STEP_PRIOR

    def prefill_s(self, num_prompt_tokens: int, num_prefix_tokens: int) -> float:
        """Return the modelled seconds of a prefill, without noise."""
        once, per_token, per_pair, per_loaded = self.prefill
        n, p = num_prompt_tokens, num_prefix_tokens
        return once + (n - p) * (per_token + per_pair * (n + p)) + p * per_loaded


class PrefillJob(NamedTuple):
    """A request at a prefill engine; ``fetched_tokens`` is the prefix that is there from ``fetched_at_s`` on."""

    number: int
    fetched_tokens: int
    fetched_at_s: float


class PrefillEngine:
    """The queue of one prefill engine. What runs is told by whoever drives it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.waiting: deque[PrefillJob] = deque()
        self.running: PrefillJob | None = None
        self.begun_s = 0.0

    def begin(self, now_s: float) -> PrefillJob | None:
        """Take the next request when idle; its computation begins at ``begun_s``, once its prefix is there."""
        if self.running is not None or not self.waiting:
            return None
        self.running = self.waiting.popleft()
        self.begun_s = max(now_s, self.running.fetched_at_s)
        return self.running

    def take_away(self, number: int) -> bool:
        """Cancel a request, waiting or running; False when it is not here."""
        if self.running is not None and self.running.number == number:
            self.running = None
            return True
        for job in self.waiting:
            if job.number == number:
                self.waiting.remove(job)
                return True
        return False


class DecodeEngine:
    """One decode engine; time advances only in :meth:`advance`."""

    def __init__(self, url: str, spec: ClusterSpec) -> None:
        self.url = url
        self.version = 0
        self._spec = spec
        self._waiting: deque[tuple[int, int, int]] = deque()
        self._running: list[tuple[float, int, int, int]] = []
        self._context = 0.0
        self._reserved = 0
        self._tokens = 0.0
        self._now_s = 0.0

    @property
    def num_running(self) -> int:
        """Return the size of the batch."""
        return len(self._running)

    @property
    def num_context_tokens(self) -> float:
        """Return the tokens that the batch attends to."""
        return self._context

    def step_s(self) -> float:
        """Return the present time between tokens."""
        once, per_request, per_token = self._spec.step
        return once + per_request * len(self._running) + per_token * self._context

    def join(self, number: int, num_prompt_tokens: int, num_output_tokens: int, *, now_s: float) -> None:
        """Add a request whose KV has arrived."""
        self.advance(now_s)
        self._waiting.append((number, num_prompt_tokens, max(num_output_tokens, 1)))
        self._admit()

    def advance(self, now_s: float) -> None:
        """Decode until ``now_s``; nothing may finish in between."""
        if now_s > self._now_s and self._running:
            num_tokens = (now_s - self._now_s) / self.step_s()
            self._tokens += num_tokens
            self._context += num_tokens * len(self._running)
        self._now_s = max(self._now_s, now_s)

    def next_finish_s(self) -> float | None:
        """Return when the next request is finished if nobody joins; None when nothing runs."""
        if not self._running:
            return None
        return self._now_s + max(self._running[0][0] - self._tokens, 0.0) * self.step_s()

    def finish(self, now_s: float) -> int:
        """Finish the request that is due now, and return its number."""
        self.advance(now_s)
        due, number, num_prompt, num_output = heapq.heappop(self._running)
        self._tokens = max(self._tokens, due)
        self._context = max(self._context - num_prompt - num_output, 0.0) if self._running else 0.0
        self._reserved -= num_prompt + num_output
        self._admit()
        return number

    def _admit(self) -> None:
        self.version += 1
        while self._waiting:
            number, num_prompt, num_output = self._waiting[0]
            size = num_prompt + num_output
            if self._running and self._reserved + size > self._spec.decode_tokens:
                return
            self._waiting.popleft()
            self._reserved += size
            self._context += num_prompt
            heapq.heappush(self._running, (self._tokens + num_output, number, num_prompt, num_output))
