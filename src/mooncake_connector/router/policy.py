"""Choose engines for one request: a prefill engine, a decode engine, and where the cached prefix comes from.

Pure: no sockets, threads or clocks; the same candidates give the same choice. A policy that takes turns or draws lots
keeps its own state. The gateway, the placement service and the simulator use the same objects.

Two questions are kept apart. *May* an engine be used at all (role, health, connector)? ``choose_pair`` answers that the
same way for every policy. *Which* of those that may? That is the policy's.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from mooncake_connector.router.messages import EngineKind, Role
from mooncake_connector.router.predictor import Predictor

PREFERENCE_LAST_RESORT = 2
"""A candidate with this preference or a higher one is used only when no other is left."""
SOURCES_MAX = 3
WORD = 1 << 64


class Candidate(msgspec.Struct):
    """One engine as the policy sees it, for the decision at hand; policies do not change it.

    Attributes:
        preference: 0 is best; an engine with a higher number is used only when none with a lower one is left.
        outstanding_tokens: unfinished work.
        num_prefix_chunks: leading chunks of this prompt that it is believed to hold.
        num_placed: legs ever placed on it.
        has_connector: whether it can take part in a hand-over.
        num_open: requests that it has not finished.
        prefix_tokens: leading tokens of this prompt that it is believed to hold.
        queue_s: predicted seconds until it could begin another prefill.
        context_tokens: KV memory that running and expected requests need for decoding.
        capacity_tokens: KV memory that there is; 0 when unknown.
        kind: whose engine it is; a pair is of one kind.
        runs_whole: whether it can run a request without another engine.
    """

    url: str
    role: Role
    preference: int = 0
    outstanding_tokens: int = 0
    num_prefix_chunks: int = 0
    num_placed: int = 0
    has_connector: bool = True
    num_open: int = 0
    prefix_tokens: int = 0
    queue_s: float = 0.0
    context_tokens: int = 0
    capacity_tokens: int = 0
    kind: EngineKind = "vllm"
    runs_whole: bool = True

    @property
    def is_healthy(self) -> bool:
        """Tell whether it is more than a last resort."""
        return self.preference < PREFERENCE_LAST_RESORT

    @property
    def is_worth_a_pair(self) -> bool:
        """Tell whether to hand over to or from it: not when it may fail and another engine can do without it."""
        return self.is_healthy or not self.runs_whole


class Demand(NamedTuple):
    """What one request asks for, and what a policy may weigh.

    Attributes:
        num_output_tokens: memory to set aside for the answer.
        backlog_s: seconds of work that wait for an engine, per engine; the price of extra work rises with it.
        can_fetch: whether an engine can get a prefix from another one.
        now_s: for what links still have to carry.
        open_below_s: an engine with more work than this is not given the request now, but it may be worth to wait for.
    """

    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    backlog_s: float = 0.0
    can_fetch: bool = False
    now_s: float = 0.0
    open_below_s: float = math.inf


NO_DEMAND = Demand()


class Start(NamedTuple):
    """A prefill on one engine as predicted.

    Attributes:
        prefix_tokens: leading tokens that need not be computed, those to be fetched included.
        source_url: where they are fetched from; empty when the engine's own are used.
        ready_s: seconds until it can begin: its turn and the fetched prefix are both there.
        prefill_s: seconds of computation from then on.
    """

    engine: Candidate
    prefix_tokens: int
    source_url: str
    ready_s: float
    prefill_s: float

    @property
    def ttft_s(self) -> float:
        """Return the predicted seconds until the prompt is computed."""
        return self.ready_s + self.prefill_s


class Choice(NamedTuple):
    """A pair of engines; ``prefill`` is None when the request runs whole on ``decode``, and ``reason`` says why.

    ``start`` is the prefill, wherever it runs.
    """

    prefill: Candidate | None
    decode: Candidate
    reason: str = ""
    start: Start | None = None


class Policy(Protocol):
    """What tells one policy from another; both choose among engines that may be used, at least one.

    A directing policy says where the prefix is fetched from; otherwise the engine decides when it begins.
    """

    name: str
    is_directing: bool

    def start(self, demand: Demand, candidates: Sequence[Candidate]) -> Start:
        """Choose where to prefill, and with which prefix."""

    def decode(self, demand: Demand, candidates: Sequence[Candidate], start: Start | None) -> Candidate:
        """Choose where to decode what is computed elsewhere; ``start`` is None when it is not known where."""


# ---- which engines may be used


class Sides(NamedTuple):
    """Who may do what for a request, as far as only the engines matter; worth keeping, since it changes seldom.

    Attributes:
        all: every engine that serves the request's model.
        prefill: the best of those that may prefill for another one.
        decode: the best of those that may decode for another one, by kind.
    """

    all: Sequence[Candidate]
    prefill: Sequence[Candidate]
    decode: Mapping[EngineKind, Sequence[Candidate]]


def sides_of(candidates: Sequence[Candidate]) -> Sides:
    """Sort engines by what they may do."""
    kinds = {each.kind: _decoding(candidates, each.kind) for each in candidates}
    return Sides(candidates, _prefilling(_with_partner(candidates)), kinds)


def choose_prefill(
    candidates: Sequence[Candidate], policy: Policy | None = None, demand: Demand = NO_DEMAND
) -> Start | None:
    """Return where to prefill, or None.

    An engine that is merely a last resort is not worth a hand-over: the decode engine computes the prompt instead.
    """
    usable = _prefilling(candidates)
    return (policy or DEFAULT_POLICY).start(demand, usable) if usable else None


def choose_pair(
    candidates: Sequence[Candidate], policy: Policy | None = None, demand: Demand = NO_DEMAND
) -> Choice | None:
    """Return a pair, or one engine for both legs when no pair can be made, or None when neither can be had.

    An engine is never paired with itself, nor with one of another kind.
    """
    return choose_among(sides_of(candidates), policy, demand)


def choose_among(sides: Sides, policy: Policy | None = None, demand: Demand = NO_DEMAND) -> Choice | None:
    """Return what :meth:`choose_pair` does."""
    policy = policy or DEFAULT_POLICY
    if not sides.prefill:
        return choose_one(sides.all, policy, demand, reason="no_prefill")
    start = policy.start(demand, sides.prefill)
    if start.engine.role == "prefill":
        others = sides.decode[start.engine.kind]
    else:
        others = _decoding([each for each in sides.all if each is not start.engine], start.engine.kind)
    if not others:
        return choose_one(sides.all, policy, demand, reason="no_decode")
    decode = policy.decode(demand, others, start)
    if not decode.has_connector:
        return choose_one([decode], policy, demand, reason="no_connector")
    return Choice(start.engine, decode, "", start)


def choose_one(
    candidates: Sequence[Candidate], policy: Policy | None = None, demand: Demand = NO_DEMAND, *, reason: str
) -> Choice | None:
    """Return one engine for both legs: a decode engine, or any healthier one when no decode engine is healthy."""
    candidates = [each for each in candidates if each.runs_whole]
    best = _best([each for each in candidates if each.role != "prefill"])
    if not best or not best[0].is_healthy:
        best = _best(candidates)
    if not best:
        return None
    start = (policy or DEFAULT_POLICY).start(demand, best)
    return Choice(None, start.engine, reason, start)


def _prefilling(candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    usable = _best([each for each in candidates if each.role != "decode" and each.has_connector])
    return [each for each in usable if each.is_worth_a_pair]


def _decoding(candidates: Sequence[Candidate], kind: str) -> Sequence[Candidate]:
    return _best([each for each in candidates if each.role != "prefill" and each.kind == kind and each.is_worth_a_pair])


def _with_partner(candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """Return those that have somebody to hand over to; all when there is but one kind, or nobody has."""
    if len({each.kind for each in candidates}) < 2:
        return candidates
    decoding = [each for each in candidates if each.role != "prefill"]
    paired = [each for each in candidates if any(other.kind == each.kind and other is not each for other in decoding)]
    return paired or candidates


def _best(candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """Return those with the best preference."""
    best = min((each.preference for each in candidates), default=0)
    return [each for each in candidates if each.preference == best]


# ---- policies


class LeastWork:
    """Least outstanding tokens, longest known prefix as tie-break, then the engine that was used least."""

    name = "least_work"
    is_directing = False

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def start(self, demand: Demand, candidates: Sequence[Candidate]) -> Start:
        """Choose where to prefill; the engine gets the longest prefix there is."""
        return left_to_engine(self._predictor, demand, candidates, min(candidates, key=self._rank))

    def decode(self, demand: Demand, candidates: Sequence[Candidate], start: Start | None) -> Candidate:
        """Choose where to decode, by the same order."""
        return min(candidates, key=self._rank)

    def _rank(self, each: Candidate) -> tuple[int, int, int, str]:
        return (each.outstanding_tokens, -each.num_prefix_chunks, each.num_placed, each.url)


class LeastLoaded(LeastWork):
    """Fewest open requests."""

    name = "least_loaded"

    def _rank(self, each: Candidate) -> tuple[int, int, int, str]:
        return (each.num_open, 0, each.num_placed, each.url)


class Prefix(LeastWork):
    """Longest prefix in the engine's own cache, then least outstanding work."""

    name = "prefix"

    def start(self, demand: Demand, candidates: Sequence[Candidate]) -> Start:
        """Choose where to prefill."""
        best = min(candidates, key=lambda each: (-each.prefix_tokens, self._rank(each)))
        return left_to_engine(self._predictor, demand, candidates, best)


class RoundRobin(LeastLoaded):
    """Prefill engines in turn."""

    name = "round_robin"

    def __init__(self, predictor: Predictor) -> None:
        super().__init__(predictor)
        self._turn = 0

    def start(self, demand: Demand, candidates: Sequence[Candidate]) -> Start:
        """Choose the next one in order of urls."""
        self._turn += 1
        ordered = sorted(candidates, key=lambda each: each.url)
        return left_to_engine(self._predictor, demand, candidates, ordered[self._turn % len(ordered)])


class Random(LeastLoaded):
    """Any prefill engine, by a reproducible draw."""

    name = "random"

    def __init__(self, predictor: Predictor, *, seed: int = 0) -> None:
        super().__init__(predictor)
        self._state = seed

    def start(self, demand: Demand, candidates: Sequence[Candidate]) -> Start:
        """Draw one."""
        # SplitMix64: a pure module has no random module.
        self._state = (self._state + 0x9E3779B97F4A7C15) % WORD
        mixed = (self._state ^ (self._state >> 30)) * 0xBF58476D1CE4E5B9 % WORD
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % WORD
        mixed ^= mixed >> 31
        drawn = candidates[mixed * len(candidates) // WORD]
        return left_to_engine(self._predictor, demand, candidates, drawn)


class MooncakePaper(LeastLoaded):
    """Algorithm 1 of the Mooncake paper (FAST'25): least sum of transfer, queue and prefill time.

    A prefix elsewhere that is ``threshold`` times longer than the engine's own is fetched, at a constant bandwidth.
    """

    name = "mooncake_paper"
    is_directing = True

    def __init__(self, predictor: Predictor, *, threshold: float = 1.5) -> None:
        super().__init__(predictor)
        self._threshold = threshold

    def start(self, demand: Demand, candidates: Sequence[Candidate]) -> Start:
        """Choose the least sum."""
        holder = max(candidates, key=lambda each: each.prefix_tokens)
        starts = [self._with(demand, each, holder) for each in candidates]
        return min(starts, key=lambda each: (each.ttft_s, each.engine.num_placed))

    def _with(self, demand: Demand, engine: Candidate, holder: Candidate) -> Start:
        predictor = self._predictor
        own, best = engine.prefix_tokens, holder.prefix_tokens
        if demand.can_fetch and best > self._threshold * own:
            transfer_s = (best - own) * predictor.kv_token_bytes / predictor.links.bytes_per_s
            prefill_s = predictor.prefill_s(demand.num_prompt_tokens, best, engine.url)
            return Start(engine, best, holder.url, transfer_s + engine.queue_s, prefill_s)
        prefill_s = predictor.prefill_s(demand.num_prompt_tokens, own, engine.url)
        return Start(engine, own, "", engine.queue_s, prefill_s)


class Source(NamedTuple):
    """An engine that could send its prefix: how long that is, when its network is free, and what remains to compute."""

    url: str
    prefix_tokens: int
    free_s: float
    prefill_s: float


class Joint:
    """Least predicted time to the first token, with extra work priced by the backlog; then the decode engine that fits.

    For each prefill engine the prefix is the best of its own and what up to ``SOURCES_MAX`` others could send, counted
    with all that the links still have to carry. One second of computation more costs ``price`` seconds of waiting: a
    busy cluster must not spend work for the sake of one request.
    """

    name = "joint"
    is_directing = True

    def __init__(
        self,
        predictor: Predictor,
        *,
        price: float = 0.3,
        price_backlog_s: float = 10.0,
        price_max: float = 2.0,
        patience_s: float = 0.5,
    ) -> None:
        self._predictor = predictor
        self._price = price
        self._price_backlog_s = price_backlog_s
        self._price_max = price_max
        self._patience_s = patience_s

    def start(self, demand: Demand, candidates: Sequence[Candidate]) -> Start:
        """Choose the least cost; among those that are open if the least is no more than ``patience_s`` cheaper.

        Of equal ones the one that was used least. Those that cannot be the least, even with the longest prefix there
        is and an idle network, are not looked at closely.
        """
        predictor, size, open_below_s = self._predictor, demand.num_prompt_tokens, demand.open_below_s
        factor = predictor.factors.get
        pay = 1 + min(self._price + demand.backlog_s / self._price_backlog_s, self._price_max)
        placed = sorted(candidates, key=_PLACED)
        holders = sorted([each for each in placed if each.prefix_tokens], key=_PREFIX, reverse=True)
        longest = holders[0].prefix_tokens if holders else 0
        sources = [
            Source(
                each.url,
                each.prefix_tokens,
                predictor.links.egress_wait_s(each.url, now_s=demand.now_s),
                predictor.prefill_s(size, each.prefix_tokens),
            )
            for each in holders[: SOURCES_MAX if demand.can_fetch else 0]
        ]
        floor_s, plain_s = predictor.prefill_s(size, longest) * pay, predictor.prefill_s(size, 0) * pay
        fetch_s = min(
            [each.free_s + each.prefix_tokens * predictor.token_transfer_s for each in sources], default=math.inf
        )
        ready: tuple[float, Start] | None = None
        later: tuple[float, Start] | None = None
        for engine in (*holders, *placed):
            queue_s = engine.queue_s
            is_open = queue_s < open_below_s
            best = ready if is_open else later
            if best is not None:
                ratio = factor(engine.url, 1.0)
                begin_s = queue_s if engine.prefix_tokens else max(queue_s, fetch_s)
                if begin_s + floor_s * ratio >= best[0] and queue_s + plain_s * ratio >= best[0]:
                    continue
            start = self._start_on(demand, engine, sources, pay)
            cost_s = start.ready_s + start.prefill_s * pay
            if best is None or cost_s < best[0]:
                ready, later = ((cost_s, start), later) if is_open else (ready, (cost_s, start))
        if ready is not None and (later is None or ready[0] <= later[0] + self._patience_s):
            return ready[1]
        assert later is not None
        return later[1]

    def _start_on(self, demand: Demand, engine: Candidate, sources: Sequence[Source], pay: float) -> Start:
        """Return the cheapest way to prefill on one engine: with its own prefix, or with a source's."""
        predictor, url, own, queue_s = self._predictor, engine.url, engine.prefix_tokens, engine.queue_s
        start = Start(engine, own, "", queue_s, predictor.prefill_s(demand.num_prompt_tokens, own, url))
        free_s = predictor.links.ingress_wait_s(url, now_s=demand.now_s) if sources else 0.0
        for source in sources:
            if source.prefix_tokens > own and source.url != url:
                fetch_s = max(source.free_s, free_s) + (source.prefix_tokens - own) * predictor.token_transfer_s
                ready_s, prefill_s = max(queue_s, fetch_s), source.prefill_s * predictor.factor(url)
                if ready_s + prefill_s * pay < start.ready_s + start.prefill_s * pay:
                    start = Start(engine, source.prefix_tokens, source.url, ready_s, prefill_s)
        return start

    def decode(self, demand: Demand, candidates: Sequence[Candidate], start: Start | None) -> Candidate:
        """Choose where the KV has arrived first; then where a token takes least; never one without memory for it."""
        predictor, now_s = self._predictor, demand.now_s
        added = demand.num_prompt_tokens + demand.num_output_tokens
        free_s = sent_s = ttft_s = 0.0
        if start is not None:
            free_s = predictor.links.egress_wait_s(start.engine.url, now_s=now_s)
            sent_s, ttft_s = demand.num_prompt_tokens * predictor.token_transfer_s, start.ttft_s
        once_s, per_request_s, per_token_s = predictor.step_coefficients
        own_s = once_s + per_request_s + per_token_s * added
        best, is_least_full, least_s = candidates[0], True, math.inf
        for each in sorted(candidates, key=_PLACED):
            cost_s = own_s + per_request_s * each.num_open + per_token_s * each.context_tokens
            if cost_s >= least_s and not is_least_full:
                continue
            is_full = 0 < each.capacity_tokens < each.context_tokens + added
            # It is sent while it is computed, so only what outlasts the computation is waited for.
            arrives_s = max(free_s, predictor.links.ingress_wait_s(each.url, now_s=now_s)) + sent_s
            cost_s += max(arrives_s - ttft_s, 0.0)
            if (is_full, cost_s) < (is_least_full, least_s):
                best, is_least_full, least_s = each, is_full, cost_s
        return best


_PREFIX = operator.attrgetter("prefix_tokens")
_PLACED = operator.attrgetter("num_placed")


def left_to_engine(predictor: Predictor, demand: Demand, candidates: Sequence[Candidate], engine: Candidate) -> Start:
    """Return a prefill on ``engine``, which gets the longest prefix there is by itself, as engines with a pool do."""
    longest = max(each.prefix_tokens for each in candidates) if demand.can_fetch else engine.prefix_tokens
    prefill_s = predictor.prefill_s(demand.num_prompt_tokens, longest, engine.url)
    return Start(engine, longest, "", engine.queue_s, prefill_s)


POLICIES = ("joint", "mooncake_paper", "prefix", "least_loaded", "least_work", "round_robin", "random")


def make_policy(name: str, predictor: Predictor, *, seed: int = 0) -> Policy:
    """Return a new policy by its name, one of ``POLICIES``.

    Raises:
        KeyError: for another name.
    """
    if name == Random.name:
        return Random(predictor, seed=seed)
    classes: dict[str, type[LeastWork | Joint]] = {
        each.name: each for each in (LeastWork, LeastLoaded, Prefix, RoundRobin, MooncakePaper, Joint)
    }
    return classes[name](predictor)


DEFAULT_POLICY: Policy = LeastWork(Predictor())
