"""Place requests and keep account of the work that is out.

Pure: no sockets, threads or clocks. Not thread-safe; one owner. Used by the gateway in-process and by the placement
service for gateways elsewhere: both see the same load.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from mooncake_connector.router.engines import PREFERENCE, Engine, EngineTable, Introduction
from mooncake_connector.router.messages import DecodeParams, Leg, Place, Placed, PrefillParams, Refused
from mooncake_connector.router.policy import Candidate, choose_one, choose_pair, choose_prefill
from mooncake_connector.router.prefix_index import PrefixIndex
from mooncake_store.errors import LocalProtocolError

OPEN_PLACEMENTS_MAX = 65_536
OUTPUT_TOKENS_UNKNOWN = 256


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
        index: what each engine was sent before.
        ttl_ns: a placement nobody finishes stops counting after this; longer than any request may run.
    """

    def __init__(self, table: EngineTable, index: PrefixIndex, *, ttl_ns: int) -> None:
        self.table = table
        self._index = index
        self._ttl_ns = ttl_ns
        self._open: dict[str, OpenPlacement] = {}

    @property
    def num_open(self) -> int:
        """Return how many placements are not finished."""
        return len(self._open)

    def place(
        self, place: Place, transfer_id: str, *, now_ns: int, colocated_reason: str = ""
    ) -> Placed | Refused:
        """Choose engines for a request and count its work.

        Args:
            place: the request.
            transfer_id: fresh and unique; names the hand-over.
            now_ns: monotonic time.
            colocated_reason: when not empty, use one engine for both legs and give this as the reason.
        """
        if len(self._open) >= OPEN_PLACEMENTS_MAX or transfer_id in self._open:
            return Refused(place.request_id, "full", f"{len(self._open)} requests are placed and not finished")
        usable = [each for each in self.table if each.is_usable and each.url not in place.excluded]
        serving = [each for each in usable if each.serves(place.model)]
        if not serving:
            return _refusal(place, self.table, usable)
        candidates = [self._candidate(each, place, now_ns) for each in serving]
        choice = choose_one(candidates, reason=colocated_reason) if colocated_reason else choose_pair(candidates)
        if choice is None:
            raise LocalProtocolError("the policy found no engine among some")
        prefill_url = choice.prefill.url if choice.prefill else ""
        opened = self._count(place, transfer_id, prefill_url, choice.decode.url, now_ns=now_ns)
        return self._placed(opened, transfer_id, choice.reason)

    def place_prefill_again(self, transfer_id: str, *, excluded: str, now_ns: int) -> Placed | None:
        """Move the prefill leg of an open placement to another engine, because ``excluded`` cannot be reached.

        Returns None when there is no other; the placement then still counts on the old one: call :meth:`colocate`.
        """
        opened = self._open.get(transfer_id)
        if opened is None:
            return None
        banned = (*opened.place.excluded, excluded, opened.decode_url)
        best = choose_prefill(
            [
                self._candidate(each, opened.place, now_ns)
                for each in self.table
                if each.is_usable and each.url not in banned and each.serves(opened.place.model)
            ]
        )
        if best is None:
            return None
        self._release(opened, "prefill")
        opened.prefill_url = best.url
        self._charge(best.url, num_prefill=opened.num_prefill_tokens)
        self._index.insert(best.url, opened.place.prefix_hashes)
        return self._placed(opened, transfer_id, "")

    def colocate(self, transfer_id: str, reason: str) -> Placed | None:
        """Drop the prefill leg of an open placement: its decode engine does both. None when it is not open."""
        opened = self._open.get(transfer_id)
        if opened is None:
            return None
        self._release(opened, "prefill")
        return self._placed(opened, transfer_id, reason)

    def finish(self, transfer_id: str, leg: Leg = "both") -> bool:
        """Stop counting a leg's work, or both legs'; False when it is not open. Idempotent."""
        opened = self._open.get(transfer_id)
        if opened is None:
            return False
        self._release(opened, leg)
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
        return is_new_life

    def remove(self, url: str) -> bool:
        """Forget an engine; requests already placed on it stay open until they finish."""
        self._index.forget(url)
        return self.table.remove(url)

    def _candidate(self, engine: Engine, place: Place, now_ns: int) -> Candidate:
        return Candidate(
            url=engine.url,
            role=engine.role,
            preference=PREFERENCE[engine.state],
            outstanding_tokens=engine.outstanding_tokens(now_ns),
            num_prefix_chunks=self._index.match(engine.url, place.prefix_hashes),
            num_placed=engine.num_placed,
            has_connector=engine.has_connector,
        )

    def _count(
        self, place: Place, transfer_id: str, prefill_url: str, decode_url: str, *, now_ns: int
    ) -> OpenPlacement:
        num_output = place.num_output_tokens or OUTPUT_TOKENS_UNKNOWN
        opened = self._open[transfer_id] = OpenPlacement(
            place=place,
            prefill_url=prefill_url,
            decode_url=decode_url,
            num_prefill_tokens=place.num_prompt_tokens,
            num_decode_tokens=place.num_prompt_tokens + num_output,
            deadline_ns=now_ns + self._ttl_ns,
        )
        if prefill_url:
            self._charge(prefill_url, num_prefill=opened.num_prefill_tokens)
            self._index.insert(prefill_url, place.prefix_hashes)
        self._charge(decode_url, num_decode=opened.num_decode_tokens)
        self._index.insert(decode_url, place.prefix_hashes)
        return opened

    def _charge(self, url: str, *, num_prefill: int = 0, num_decode: int = 0) -> None:
        engine = self.table.get(url)
        if engine is not None:
            engine.prefill_tokens += num_prefill
            engine.decode_tokens += num_decode
            engine.num_open += 1
            engine.num_placed += 1

    def _release(self, opened: OpenPlacement, leg: Leg) -> None:
        if leg != "decode" and opened.prefill_url:
            self._discharge(opened.prefill_url, num_prefill=opened.num_prefill_tokens)
            opened.prefill_url = ""
        if leg != "prefill" and opened.decode_url:
            self._discharge(opened.decode_url, num_decode=opened.num_decode_tokens)
            opened.decode_url = ""

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
        return Placed(
            request_id,
            source.url,
            opened.decode_url,
            transfer_id,
            PrefillParams(do_remote_decode=True, do_remote_prefill=False, transfer_id=transfer_id),
            DecodeParams(
                do_remote_prefill=True,
                do_remote_decode=False,
                transfer_id=transfer_id,
                remote_engine_id=source.introduction.engine_id,
                remote_addresses=source.introduction.addresses,
            ),
        )


def _refusal(place: Place, table: Iterable[Engine], usable: list[Engine]) -> Refused:
    engines = list(table)
    if not engines:
        return Refused(place.request_id, "no_engine", "no engine is registered")
    if not usable:
        states = ", ".join(f"{each.url} is {each.state.value}" for each in engines[:8])
        return Refused(place.request_id, "no_engine", f"no engine can take the request: {states}")
    models = sorted({name for each in usable if each.introduction for name in each.introduction.models})
    known = ", ".join(models[:16]) or "none"
    return Refused(place.request_id, "no_model", f"the model {place.model!r} does not exist; served here: {known}")

