"""Place requests and keep account of the work that is out.

Pure: no sockets, threads or clocks. Not thread-safe; one owner. Used by the gateway in-process, by the placement
service for gateways elsewhere, and by the simulator: all see the same load and ask the same policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import msgspec

from mooncake_connector.router.dialects.select import DIALECTS
from mooncake_connector.router.engines import Engine, EngineTable, Introduction
from mooncake_connector.router.index.told import Told
from mooncake_connector.router.messages import Leg, Place, Placed, Refused
from mooncake_connector.router.policy import (
    Choice,
    Demand,
    Policy,
    Sides,
    Start,
    choose_among,
    choose_one,
    choose_pair,
    choose_prefill,
    make_policy,
    sides_of,
)
from mooncake_connector.router.predictor import Predictor
from mooncake_connector.router.prefix_index import PrefixIndex
from mooncake_connector.router.roster import Roster

OPEN_PLACEMENTS_MAX = 65_536
OUTPUT_TOKENS_UNKNOWN = 256
LIVE_POLICY = "least_work"


class OpenPlacement(msgspec.Struct):
    """A placed request that is not finished. An empty url means that this leg does not exist or is over."""

    place: Place
    prefill_url: str
    decode_url: str
    num_prefill_tokens: int
    num_decode_tokens: int
    deadline_ns: int


class Placer:
    """Chooses engines, hands out transfer ids' params, and counts outstanding work per engine.

    Args:
        table: the engines.
        index: what each engine holds.
        ttl_ns: a placement nobody finishes stops counting after this; longer than any request may run.
        predictor: how long things take.
        policy: how to choose; least outstanding work when left out.
        chunk_tokens: prompt tokens per hash; 0 when a chunk is a part of the text, so that only its share is known.
        can_fetch: whether engines get prefixes from each other.
        is_index_told: whether somebody else tells the index what engines hold; otherwise an engine is believed to hold
            what it was sent.
        told: what engines tell of their caches; None when none is asked.
    """

    def __init__(
        self,
        table: EngineTable,
        index: PrefixIndex,
        *,
        ttl_ns: int,
        predictor: Predictor | None = None,
        policy: Policy | None = None,
        chunk_tokens: int = 0,
        can_fetch: bool = False,
        is_index_told: bool = False,
        told: Told | None = None,
    ) -> None:
        self.table = table
        self.predictor = predictor or Predictor()
        self.policy = policy or make_policy(LIVE_POLICY, self.predictor)
        self._index = index
        self._ttl_ns = ttl_ns
        self._chunk_tokens = chunk_tokens
        self._can_fetch = can_fetch
        self._is_index_told = is_index_told
        self._told = told
        self._open: dict[str, OpenPlacement] = {}
        self._roster = Roster(table)
        self._now_ns = 0

    @property
    def num_open(self) -> int:
        """Return how many placements are not finished."""
        return len(self._open)

    def place(self, place: Place, transfer_id: str, *, now_ns: int, colocated_reason: str = "") -> Placed | Refused:
        """Choose engines for a request and count its work.

        Args:
            place: the request.
            transfer_id: fresh and unique; names the hand-over.
            now_ns: monotonic time.
            colocated_reason: when not empty, use one engine for both legs and give this as the reason.
        """
        choice = self.propose(place, now_ns=now_ns, colocated_reason=colocated_reason)
        return choice if isinstance(choice, Refused) else self.commit(place, transfer_id, choice, now_ns=now_ns)

    def propose(
        self,
        place: Place,
        *,
        now_ns: int,
        colocated_reason: str = "",
        backlog_s: float = 0.0,
        open_below_s: float = math.inf,
    ) -> Choice | Refused:
        """Choose engines for a request, and change nothing.

        Args:
            place: the request.
            now_ns: monotonic time.
            colocated_reason: when not empty, use one engine for both legs and give this as the reason.
            backlog_s: seconds of work that wait for an engine, per engine.
            open_below_s: engines with more work than this are not given the request now.
        """
        sides = self._roster.sides(place.model)
        if place.excluded:
            sides = sides_of([each for each in sides.all if each.url not in place.excluded])
        if not sides.all:
            return _refusal(place, self.table)
        self._refresh(place, now_ns)
        demand = self._demand(place, now_ns, backlog_s, open_below_s)
        if colocated_reason:
            choice = choose_one(sides.all, self.policy, demand, reason=colocated_reason)
        else:
            choice = choose_among(sides, self.policy, demand)
        if choice is None and colocated_reason:
            able = [each for each in sides.all if colocated_reason not in DIALECTS[each.kind].unsplittable]
            choice = choose_pair(able, self.policy, demand)
        return choice or _half_refusal(place, self._serving(sides), colocated_reason)

    def commit(self, place: Place, transfer_id: str, choice: Choice, *, now_ns: int) -> Placed | Refused:
        """Count a request's work on the engines proposed for it.

        Args:
            place: the request.
            transfer_id: fresh and unique; names the hand-over.
            choice: what :meth:`propose` returned, with nothing placed or finished in between.
            now_ns: monotonic time.
        """
        if len(self._open) >= OPEN_PLACEMENTS_MAX or transfer_id in self._open:
            return Refused(place.request_id, "full", f"{len(self._open)} requests are placed and not finished")
        opened = self._count(place, transfer_id, choice, now_ns=now_ns)
        return self._placed(opened, transfer_id, choice.reason)

    def place_prefill_again(self, transfer_id: str, *, excluded: str, now_ns: int) -> Placed | None:
        """Move the prefill leg of an open placement to another engine, because ``excluded`` cannot be reached.

        Returns None when there is no other; the placement then still counts on the old one: call :meth:`colocate`.
        """
        opened = self._open.get(transfer_id)
        if opened is None:
            return None
        decode = self.table.get(opened.decode_url)
        kind = decode.kind if decode is not None else None
        banned = (*opened.place.excluded, excluded, opened.decode_url)
        serving = [
            each
            for each in self.table
            if each.is_usable and each.url not in banned and each.serves(opened.place.model) and each.kind == kind
        ]
        self._refresh(opened.place, now_ns)
        start = choose_prefill(self._roster.candidates(serving), self.policy, self._demand(opened.place, now_ns))
        if start is None:
            return None
        self._release(transfer_id, opened, "prefill", now_ns)
        opened.prefill_url = start.engine.url
        self._count_prefill(transfer_id, opened, start, now_ns)
        return self._placed(opened, transfer_id, "")

    def colocate(self, transfer_id: str, reason: str) -> Placed | None:
        """Drop the prefill leg of an open placement: its decode engine does both. None when it is not open."""
        opened = self._open.get(transfer_id)
        if opened is None:
            return None
        self._release(transfer_id, opened, "prefill", self._now_ns)
        return self._placed(opened, transfer_id, reason)

    def finish(self, transfer_id: str, leg: Leg = "both", *, now_ns: int = 0) -> bool:
        """Stop counting a leg's work, or both legs'; False when it is not open. Idempotent.

        Without ``now_ns`` it counts as finished when the placer was last told the time.
        """
        opened = self._open.get(transfer_id)
        if opened is None:
            return False
        self._release(transfer_id, opened, leg, max(now_ns, self._now_ns))
        if not opened.prefill_url and not opened.decode_url:
            del self._open[transfer_id]
        return True

    def expire(self, now_ns: int) -> list[str]:
        """Finish every placement that is past its ttl, and return their transfer ids."""
        late = [transfer_id for transfer_id, opened in self._open.items() if opened.deadline_ns <= now_ns]
        for transfer_id in late:
            self.finish(transfer_id)
        return late

    def introduce(self, url: str, introduction: Introduction) -> bool:
        """Keep what an engine told; True when it is a new process, whose prefixes are then forgotten."""
        is_new_life = self.table.introduce(url, introduction)
        if is_new_life:
            self._index.forget(url)
            if self._told is not None:
                self._told.forget(url)
        return is_new_life

    def remove(self, url: str) -> bool:
        """Forget an engine; requests already placed on it stay open until they finish."""
        self._index.forget(url)
        self.predictor.forget(url)
        return self.table.remove(url)

    @property
    def wants_tokens(self) -> bool:
        """Tell whether a prompt's token ids make a difference."""
        return self._told is not None and self._told.is_used

    @property
    def num_decoding(self) -> int:
        """Return how many engines may decode."""
        self._roster.catch_up()
        return self._roster.num_decoding

    @property
    def decode_tokens(self) -> int:
        """Return the KV memory of all engines that may decode; 0 when that of one is unknown."""
        self._roster.catch_up()
        return self._roster.decode_tokens

    def is_prefilling(self, transfer_id: str) -> bool:
        """Tell whether an open placement's prefill, on an engine of its own, is not over."""
        opened = self._open.get(transfer_id)
        return opened is not None and bool(opened.prefill_url)

    def decoding(self, url: str) -> tuple[int, int]:
        """Return how many requests decode on an engine, or will, and the KV memory that they need in tokens."""
        row = self._roster.row(url)
        return (len(row.decode), row.decode.num_tokens) if row is not None else (0, 0)

    def backlog_s(self, *, now_ns: int) -> tuple[float, ...]:
        """Return for each engine that may prefill the predicted seconds until it could begin another request."""
        return self._roster.queues_s(now_ns)

    def _serving(self, sides: Sides) -> list[Engine]:
        return [engine for each in sides.all if (engine := self.table.get(each.url)) is not None]

    def _demand(self, place: Place, now_ns: int, backlog_s: float = 0.0, open_below_s: float = math.inf) -> Demand:
        num_output = self.predictor.reserved_tokens(place.num_output_tokens)
        return Demand(place.num_prompt_tokens, num_output, backlog_s, self._can_fetch, now_ns / 1e9, open_below_s)

    def _refresh(self, place: Place, now_ns: int) -> None:
        chain = place.prefix_hashes
        matches: Mapping[str, int] = self._index.match_all(chain)
        chunk_tokens = self._chunk_tokens or (place.num_prompt_tokens / len(chain) if chain else 0.0)
        if self._told is not None:
            believed = {url: int(num_chunks * chunk_tokens) for url, num_chunks in matches.items()}
            matches, chunk_tokens = self._told.correct(place, believed), 1.0
        self._roster.refresh(
            matches,
            chunk_tokens=chunk_tokens,
            num_prompt_tokens=place.num_prompt_tokens,
            now_ns=now_ns,
        )

    def _count(self, place: Place, transfer_id: str, choice: Choice, *, now_ns: int) -> OpenPlacement:
        num_output = place.num_output_tokens or OUTPUT_TOKENS_UNKNOWN
        opened = self._open[transfer_id] = OpenPlacement(
            place=place,
            prefill_url=choice.prefill.url if choice.prefill else "",
            decode_url=choice.decode.url,
            num_prefill_tokens=place.num_prompt_tokens,
            num_decode_tokens=place.num_prompt_tokens + num_output,
            deadline_ns=now_ns + self._ttl_ns,
        )
        if choice.prefill is not None and choice.start is not None:
            self._count_prefill(transfer_id, opened, choice.start, now_ns)
        elif choice.start is not None:
            predicted_s = choice.start.ttft_s - choice.start.engine.queue_s
            if (row := self._roster.row(opened.decode_url)) is not None:
                row.prefill.add(transfer_id, predicted_s, now_s=now_ns / 1e9)
        self._charge(opened.decode_url, num_decode=opened.num_decode_tokens)
        num_reserved = place.num_prompt_tokens + self.predictor.reserved_tokens(place.num_output_tokens)
        if (row := self._roster.row(opened.decode_url)) is not None:
            row.decode.add(transfer_id, num_reserved)
            row.tell_load(now_ns)
        self._remember(opened.decode_url, place)
        return opened

    def _count_prefill(self, transfer_id: str, opened: OpenPlacement, start: Start, now_ns: int) -> None:
        """Count the prefill, and both transfers that it causes."""
        url, now_s = start.engine.url, now_ns / 1e9
        predictor = self.predictor
        self._now_ns = max(self._now_ns, now_ns)
        self._charge(url, num_prefill=opened.num_prefill_tokens)
        # Until a fetched prefix is there the engine waits, with its turn.
        predicted_s = start.ttft_s - start.engine.queue_s
        if (row := self._roster.row(url)) is not None:
            row.prefill.add(transfer_id, predicted_s, now_s=now_s)
        if start.source_url:
            num_fetched = start.prefix_tokens - start.engine.prefix_tokens
            predictor.links.book(start.source_url, url, num_fetched * predictor.kv_token_bytes, now_s=now_s)
        self._roster.touch(url, now_ns)
        size_bytes = opened.num_prefill_tokens * predictor.kv_token_bytes
        predictor.links.book(url, opened.decode_url, size_bytes, now_s=now_s)
        self._remember(url, opened.place)

    def _remember(self, url: str, place: Place) -> None:
        if not self._is_index_told:
            self._index.insert(url, place.prefix_hashes)

    def _charge(self, url: str, *, num_prefill: int = 0, num_decode: int = 0) -> None:
        engine = self.table.get(url)
        if engine is not None:
            engine.prefill_tokens += num_prefill
            engine.decode_tokens += num_decode
            engine.num_open += 1
            engine.num_placed += 1

    def _release(self, transfer_id: str, opened: OpenPlacement, leg: Leg, now_ns: int) -> None:
        self._now_ns = max(self._now_ns, now_ns)
        urls = (opened.prefill_url, opened.decode_url)
        if leg != "decode":
            # A request that runs whole has its prefill where it decodes.
            if (row := self._roster.row(opened.prefill_url or opened.decode_url)) is not None:
                row.prefill.finish(transfer_id, now_s=now_ns / 1e9)
            if opened.prefill_url:
                self._discharge(opened.prefill_url, num_prefill=opened.num_prefill_tokens)
            opened.prefill_url = ""
        if leg != "prefill" and opened.decode_url:
            if (row := self._roster.row(opened.decode_url)) is not None:
                row.decode.finish(transfer_id)
            self._discharge(opened.decode_url, num_decode=opened.num_decode_tokens)
            opened.decode_url = ""
        for url in urls:
            self._roster.touch(url, now_ns)

    def _discharge(self, url: str, *, num_prefill: int = 0, num_decode: int = 0) -> None:
        engine = self.table.get(url)
        if engine is not None:
            # Clamped: an engine that was removed and registered anew starts from zero while old legs are still open.
            engine.prefill_tokens = max(0, engine.prefill_tokens - num_prefill)
            engine.decode_tokens = max(0, engine.decode_tokens - num_decode)
            engine.num_open = max(0, engine.num_open - 1)

    def _placed(self, opened: OpenPlacement, transfer_id: str, reason: str) -> Placed:
        request_id = opened.place.request_id
        source = self.table.get(opened.prefill_url) if opened.prefill_url else None
        if source is None or source.introduction is None:
            return Placed(request_id, "", opened.decode_url, transfer_id, reason=reason)
        placed = Placed(request_id, source.url, opened.decode_url, transfer_id)
        return DIALECTS[source.kind].pair(source.introduction, transfer_id, placed)


def _refusal(place: Place, table: Iterable[Engine]) -> Refused:
    engines = list(table)
    usable = [each for each in engines if each.is_usable and each.url not in place.excluded]
    if not engines:
        return Refused(place.request_id, "no_engine", "no engine is registered")
    if not usable:
        states = ", ".join(f"{each.url} is {each.state.value}" for each in engines[:8])
        return Refused(place.request_id, "no_engine", f"no engine can take the request: {states}")
    models = sorted({name for each in usable if each.introduction for name in each.introduction.models})
    known = ", ".join(models[:16]) or "none"
    return Refused(place.request_id, "no_model", f"the model {place.model!r} does not exist; served here: {known}")


def _half_refusal(place: Place, serving: Iterable[Engine], colocated_reason: str) -> Refused:
    """Say why nothing can be done though there are servers: each does only its half of a request."""
    if colocated_reason:
        return Refused(
            place.request_id,
            "no_engine",
            f"this request cannot be split ({colocated_reason}), and every server for it does only its half; give the "
            "router one that runs whole requests",
        )
    states = ", ".join(f"{each.url} ({each.role}) is {each.state.value}" for each in list(serving)[:8])
    return Refused(
        place.request_id, "no_engine", f"no prefill and decode server can take the request together: {states}"
    )
