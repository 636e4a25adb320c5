"""How long the router takes to decide: 64 engines, a million known blocks, 12,000-token prompts.

``submit`` takes a request in, its tokens hashed and looked up in the index included, and sends it on at once where an
engine is free; ``poll`` decides, whenever a prefill ends, who is next. Requests come at a part of what the engines can
serve: below 1 hardly anybody waits, above 1 the queue is as long as the promised 30 s allow. Of each prompt two engines
hold the first half. The engines are a clock. Wanted: submit <= 100 us p50 and <= 1 ms p99.
"""

from __future__ import annotations

import heapq
import random
import time
from typing import Any, NamedTuple

import harness
import prefix_index

from mooncake_connector.router.admission import AdmissionQueue, ServiceClass
from mooncake_connector.router.engines import EngineEvent, EngineTable, Introduction
from mooncake_connector.router.index.told import Told
from mooncake_connector.router.messages import Place
from mooncake_connector.router.placer import Placer
from mooncake_connector.router.policy import make_policy
from mooncake_connector.router.predictor import Predictor
from mooncake_connector.router.prefix_index import PrefixIndex
from mooncake_connector.router.scheduler import Action, Dispatched, Scheduler, Submission

NUM_PREFILL = NUM_DECODE = prefix_index.NUM_ENGINES // 2
PROMPT_TOKENS = prefix_index.PROMPT_TOKENS
OUTPUT_TOKENS = 300
DECODE_S = 10.0


class Case(NamedTuple):
    """How busy the engines are, and whether two of them hold the first half of each prompt or nobody holds anything."""

    load: float
    held: str


CASES = (Case(0.5, "none"), Case(0.5, "half"), Case(0.9, "half"), Case(1.5, "half"))


def main() -> None:
    args = harness.parser(__doc__.splitlines()[0]).parse_args()
    scale = prefix_index.Scale(48_000, 0) if args.quick else prefix_index.Scale(1_000_000, 0)
    holdings, work = prefix_index.new_holdings(scale), prefix_index.Workload(scale)
    prefix_index.take(holdings, work.fill())
    prompts = {case: [tokens.astype("<u4").tobytes() for tokens in work.prompts[case]] for case in ("none", "half")}
    harness.say(f"  {holdings.blocks.num_live} blocks are indexed")
    rows = []
    for case in CASES[1:2] if args.quick else CASES:
        rows.append(measure(case, Bench(Told(holdings), prompts[case.held]), 300 if args.quick else 4_000))
    harness.publish(args, rows, title="Router decisions: 64 engines, 1,000,000 blocks, 12,000-token prompts "
                                      "(submit <= 100 us p50, <= 1 ms p99 wanted)")  # fmt: skip


class Bench:
    """A scheduler, and engines that take exactly as long as predicted."""

    def __init__(self, told: Told, prompts: list[bytes]) -> None:
        self.rng = random.Random(0)
        self.prompts = prompts
        self.predictor = Predictor()
        table = EngineTable()
        placer = Placer(
            table, PrefixIndex(), ttl_ns=1 << 60, predictor=self.predictor, policy=make_policy("joint", self.predictor),
            can_fetch=True, is_index_told=True, told=told,
        )  # fmt: skip
        for number, (url, _) in enumerate(prefix_index.SOURCES):
            engine = table.add(url, "decode" if number % 2 else "prefill")
            engine.capacity_tokens = 1_300_000
            placer.introduce(url, Introduction(("model",), url, ("tcp://0",)))
            table.observe(url, EngineEvent.HEALTHY)
        self.free_s = {each.url: 0.0 for each in table}
        self.scheduler = Scheduler(placer, AdmissionQueue({"": ServiceClass()}))
        self.ends: list[tuple[float, int, str, str]] = []
        self.num_ends = 0
        self.submit_us: list[float] = []
        self.poll_us: list[float] = []
        self.num_waiting: list[int] = []

    def submission(self, number: int) -> Submission:
        """Return the next request."""
        return Submission(Place(str(number), PROMPT_TOKENS, OUTPUT_TOKENS, token_ids=self.rng.choice(self.prompts)))

    def submit(self, submission: Submission, now_s: float) -> None:
        """Submit a request and note how long that took."""
        self.num_waiting.append(len(self.scheduler.queue))
        begun_ns = time.perf_counter_ns()
        actions = self.scheduler.submit(submission, now_s=now_s)
        self.submit_us.append((time.perf_counter_ns() - begun_ns) / 1e3)
        self.obey(actions, now_s)

    def obey(self, actions: list[Action], now_s: float) -> None:
        """Let the engines compute what they are sent."""
        for action in actions:
            if isinstance(action, Dispatched):
                start = action.choice.start
                assert start is not None
                begin_s = max(now_s + start.ready_s - start.engine.queue_s, self.free_s[start.engine.url])
                self.free_s[start.engine.url] = end_s = begin_s + start.prefill_s
                self._at(end_s, action.request_id, start.engine.url)
                self._at(end_s + DECODE_S, action.request_id, "")

    def _at(self, when_s: float, request_id: str, engine: str) -> None:
        self.num_ends += 1
        heapq.heappush(self.ends, (when_s, self.num_ends, request_id, engine))

    def run_until(self, now_s: float) -> None:
        """Let everything end that ends before ``now_s``."""
        while self.ends and self.ends[0][0] <= now_s:
            ended_s, _, request_id, engine = heapq.heappop(self.ends)
            self.scheduler.placer.finish(request_id, "prefill" if engine else "both", now_ns=int(ended_s * 1e9))
            begun_ns = time.perf_counter_ns()
            actions = self.scheduler.poll(now_s=ended_s)
            if engine:
                self.poll_us.append((time.perf_counter_ns() - begun_ns) / 1e3)
            self.obey(actions, ended_s)


def measure(case: Case, bench: Bench, runs: int) -> dict[str, Any]:
    work_s = bench.predictor.prefill_s(PROMPT_TOKENS, PROMPT_TOKENS // 2 if case.held == "half" else 0)
    gap_s, now_s = work_s / NUM_PREFILL / case.load, 0.0
    for number in range(runs + runs // 4):
        now_s += bench.rng.expovariate(1 / gap_s)
        bench.run_until(now_s)
        bench.submit(bench.submission(number), now_s)
    # The first fifth fills the engines.
    submit_us, poll_us = sorted(bench.submit_us[runs // 4 :]), sorted(bench.poll_us[len(bench.poll_us) // 5 :])
    waiting = bench.num_waiting[runs // 4 :]
    return {
        "load": case.load, "held": case.held, "runs": runs, "waiting_mean": round(sum(waiting) / len(waiting), 1),
        "submit_p50_us": round(submit_us[runs // 2], 1), "submit_p99_us": round(submit_us[int(runs * 0.99)], 1),
        "poll_p50_us": round(poll_us[len(poll_us) // 2], 1),
        "poll_p99_us": round(poll_us[int(len(poll_us) * 0.99)], 1),
    }  # fmt: skip


if __name__ == "__main__":
    harness.run(main)
