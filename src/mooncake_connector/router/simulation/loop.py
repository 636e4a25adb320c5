"""Run a trace through the router's own placing and admission, against modelled engines.

Discrete events, no real time, one random generator for the noise of each request: the same seed gives the same run, and
different policies meet the same noise.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from mooncake_connector.router.admission import AdmissionQueue, Rejected, ServiceClass
from mooncake_connector.router.engines import EngineEvent, EngineTable, Introduction
from mooncake_connector.router.messages import Place
from mooncake_connector.router.placer import Placer
from mooncake_connector.router.policy import MooncakePaper, make_policy
from mooncake_connector.router.predictor import Links, Predictor
from mooncake_connector.router.prefix_index import PrefixIndex
from mooncake_connector.router.scheduler import Action, Dispatched, Mode, Scheduler, Submission
from mooncake_connector.router.simulation.cluster import ClusterSpec, DecodeEngine, PrefillEngine, PrefillJob
from mooncake_connector.router.simulation.trace import BLOCK_TOKENS, TraceRequest

TTL_S = 1e6
PROGRESS_EVERY = 2000


class RunSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One run: what decides, and under which promises."""

    policy: str = "joint"
    mode: Mode = "queue"
    is_rejecting: bool = True
    classes: Mapping[str, ServiceClass] = msgspec.field(default_factory=lambda: {"": ServiceClass()})
    seed: int = 0


class Outcome(msgspec.Struct):
    """What became of one request; times in seconds of the simulation, -1 for what did not happen."""

    arrived_s: float
    dispatched_s: float = -1.0
    prefilled_s: float = -1.0
    handed_over_s: float = -1.0
    finished_s: float = -1.0
    rejected_s: float = -1.0
    reason: str = ""
    retry_after_s: int = 0
    predicted_ttft_s: float = -1.0
    prefill_work_s: float = 0.0
    num_cached: int = 0


class Simulation:
    """One run of a trace. Use once: ``run()`` returns an outcome per request."""

    def __init__(self, requests: Sequence[TraceRequest], cluster: ClusterSpec, run: RunSpec) -> None:
        self._requests = requests
        self._cluster = cluster
        self._spec = run
        self.outcomes = [Outcome(each.arrived_s) for each in requests]
        rng = random.Random(run.seed)
        self._noise = [rng.lognormvariate(0.0, cluster.noise) for _ in requests]
        self._events: list[tuple[float, int, Callable[..., None], Any]] = []
        self._num_events = 0
        self._wake_at_s: float | None = None
        self._links = Links(cluster.link_bytes_per_s)
        self._prefill = {
            f"http://prefill-{number:03}": PrefillEngine(f"http://prefill-{number:03}")
            for number in range(cluster.num_prefill)
        }
        self._decode = {
            f"http://decode-{number:03}": DecodeEngine(f"http://decode-{number:03}", cluster)
            for number in range(cluster.num_decode)
        }
        self._cache_blocks = max(cluster.cache_tokens // BLOCK_TOKENS, 1)
        self._cache = PrefixIndex(entries_max=self._cache_blocks)
        self._targets: dict[int, tuple[str, str]] = {}
        self.scheduler = self._scheduler()
        self._is_directed = self.scheduler.placer.policy.is_directing

    def run(self, progress: Callable[[int, int], None] | None = None) -> list[Outcome]:
        """Serve the whole trace; ``progress`` is told how many of how many requests have arrived."""
        for each in self._requests:
            self._at(each.arrived_s, self._arrive, each)
        num_arrived = 0
        while self._events:
            now_s, _, handler, argument = heapq.heappop(self._events)
            handler(now_s, argument)
            if progress and handler == self._arrive:
                num_arrived += 1
                if num_arrived % PROGRESS_EVERY == 0:
                    progress(num_arrived, len(self._requests))
        return self.outcomes

    def _scheduler(self) -> Scheduler:
        cluster, run = self._cluster, self._spec
        predictor = Predictor(kv_token_bytes=cluster.kv_token_bytes, link_bytes_per_s=cluster.link_bytes_per_s)
        table = EngineTable()
        # Algorithm 1 counts a prefix as cached from the moment it assigns a request.
        is_told = run.policy != MooncakePaper.name
        placer = Placer(
            table,
            self._cache if is_told else PrefixIndex(entries_max=self._cache_blocks),
            ttl_ns=int(TTL_S * 1e9),
            predictor=predictor,
            policy=make_policy(run.policy, predictor, seed=run.seed),
            chunk_tokens=BLOCK_TOKENS,
            can_fetch=cluster.has_pool,
            is_index_told=is_told,
        )
        for url in self._prefill:
            table.add(url, "prefill")
        for url in self._decode:
            table.add(url, "decode").capacity_tokens = cluster.decode_tokens
        for url in (*self._prefill, *self._decode):
            placer.introduce(url, Introduction(("model",), url, ("tcp://0",)))
            table.observe(url, EngineEvent.HEALTHY)
        return Scheduler(placer, AdmissionQueue(run.classes), mode=run.mode, is_rejecting=run.is_rejecting)

    # ---- events

    def _at(self, when_s: float, handler: Callable[..., None], argument: Any) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (when_s, self._num_events, handler, argument))

    def _arrive(self, now_s: float, request: TraceRequest) -> None:
        place = Place(str(request.number), request.num_prompt_tokens, request.output_hint, prefix_hashes=request.chain)
        submission = Submission(place, request.service_class, request.tenant)
        self._do(self.scheduler.submit(submission, now_s=now_s), now_s)

    def _wake(self, now_s: float, _: None) -> None:
        if now_s == self._wake_at_s:  # otherwise an earlier one took its place
            self._wake_at_s = None
            self._poll(now_s)

    def _poll(self, now_s: float) -> None:
        self._do(self.scheduler.poll(now_s=now_s), now_s)

    def _do(self, actions: list[Action], now_s: float) -> None:
        for action in actions:
            if isinstance(action, Dispatched):
                self._send(int(action.request_id), action, now_s)
            elif isinstance(action, Rejected) and action.reason == "late":
                self._take_back(int(action.request_id), now_s)
            elif isinstance(action, Rejected):
                self._reject(int(action.request_id), action.reason, action.retry_after_s, now_s)
            else:
                self._reject(int(action.subject), action.code, 1, now_s)
        wake_s = self.scheduler.wake_s
        if wake_s is not None and (self._wake_at_s is None or wake_s < self._wake_at_s - 1e-6):
            self._wake_at_s = wake_s
            self._at(wake_s, self._wake, None)

    def _reject(self, number: int, reason: str, retry_after_s: int, now_s: float) -> None:
        outcome = self.outcomes[number]
        outcome.rejected_s, outcome.reason, outcome.retry_after_s = now_s, reason, retry_after_s

    def _send(self, number: int, action: Dispatched, now_s: float) -> None:
        start = action.choice.start
        assert start is not None
        request, outcome = self._requests[number], self.outcomes[number]
        outcome.dispatched_s = now_s
        outcome.predicted_ttft_s = now_s - outcome.arrived_s + start.ttft_s
        engine = self._prefill[start.engine.url]
        source_url = start.source_url
        if self._cluster.has_pool and not self._is_directed:
            source_url = self._longest(request)[0]
        fetched_tokens, fetched_at_s = self._fetch(source_url, engine.url, request, now_s)
        engine.waiting.append(PrefillJob(number, fetched_tokens, fetched_at_s))
        self._targets[number] = (engine.url, action.choice.decode.url)
        self._begin(engine, now_s)

    def _longest(self, request: TraceRequest) -> tuple[str, int]:
        """Return the engine with the longest prefix of a request, and how many tokens that are."""
        holders = self._cache.match_all(request.chain)
        if not holders:
            return "", 0
        url = max(holders, key=holders.__getitem__)
        return url, holders[url] * BLOCK_TOKENS

    def _is_worth_fetching(self, request: TraceRequest, here: int, there: int) -> bool:
        cluster, size = self._cluster, request.num_prompt_tokens
        saved_s = cluster.prefill_s(size, min(here, size)) - cluster.prefill_s(size, min(there, size))
        return saved_s > (there - here) * cluster.kv_token_bytes / cluster.link_bytes_per_s

    def _fetch(self, source: str, target: str, request: TraceRequest, now_s: float) -> tuple[int, float]:
        """Return the prefix that ``target`` has once it got what ``source`` has more, and when."""
        there, here = (self._cache.match(url, request.chain) * BLOCK_TOKENS for url in (source, target))
        if there <= here:
            return 0, now_s
        size_bytes = (there - here) * self._cluster.kv_token_bytes
        return there, now_s + self._links.book(source, target, size_bytes, now_s=now_s)

    def _begin(self, engine: PrefillEngine, now_s: float) -> None:
        job = engine.begin(now_s)
        if job is None:
            return
        request, outcome = self._requests[job.number], self.outcomes[job.number]
        own = self._cache.match(engine.url, request.chain) * BLOCK_TOKENS
        fetched = max(job.fetched_tokens, own)
        if self._is_directed and self._cluster.has_pool:
            source_url, there = self._longest(request)
            if there > fetched and self._is_worth_fetching(request, fetched, there):
                fetched, engine.begun_s = self._fetch(source_url, engine.url, request, engine.begun_s)
        num_prefix = min(fetched, request.num_prompt_tokens)
        work_s = self._cluster.prefill_s(request.num_prompt_tokens, num_prefix) * self._noise[job.number]
        outcome.prefill_work_s, outcome.num_cached = work_s, num_prefix
        size_bytes = request.num_prompt_tokens * self._cluster.kv_token_bytes
        arrives_s = self._links.book(engine.url, self._targets[job.number][1], size_bytes, now_s=engine.begun_s)
        self._at(engine.begun_s + work_s, self._prefilled, (engine, job, engine.begun_s + arrives_s))

    def _prefilled(self, now_s: float, argument: tuple[PrefillEngine, PrefillJob, float]) -> None:
        engine, job, arrived_s = argument
        if engine.running is not job:
            return
        number = job.number
        engine.running = None
        request, outcome = self._requests[number], self.outcomes[number]
        outcome.prefilled_s = now_s
        self._cache.insert(engine.url, request.chain)
        self.scheduler.prefilled(
            str(number),
            now_s=now_s,
            engine=engine.url,
            num_prompt=request.num_prompt_tokens,
            num_prefix=outcome.num_cached,
            took_s=outcome.prefill_work_s,
        )
        self._begin(engine, now_s)
        self._at(max(now_s, arrived_s), self._hand_over, number)
        self._poll(now_s)

    def _take_back(self, number: int, now_s: float) -> None:
        """Cancel a request at its engine."""
        engine, outcome = self._prefill[self._targets[number][0]], self.outcomes[number]
        is_running = engine.running is not None and engine.running.number == number
        engine.take_away(number)
        outcome.prefill_work_s = now_s - engine.begun_s if is_running else 0.0
        self._reject(number, "late", 1, now_s)
        self.scheduler.cancel(str(number), now_s=now_s)
        self._begin(engine, now_s)
        self._poll(now_s)

    def _hand_over(self, now_s: float, number: int) -> None:
        request = self._requests[number]
        self.outcomes[number].handed_over_s = now_s
        engine = self._decode[self._targets[number][1]]
        engine.join(number, request.num_prompt_tokens, request.num_output_tokens, now_s=now_s)
        self._expect(engine)

    def _expect(self, engine: DecodeEngine) -> None:
        due_s = engine.next_finish_s()
        if due_s is not None:
            self._at(due_s, self._decoded, (engine, engine.version))

    def _decoded(self, now_s: float, argument: tuple[DecodeEngine, int]) -> None:
        engine, version = argument
        if engine.version != version:
            return
        number = engine.finish(now_s)
        self.outcomes[number].finished_s = now_s
        self.scheduler.finished(str(number), now_s=now_s, num_output=self._requests[number].num_output_tokens)
        self._expect(engine)
        self._poll(now_s)
