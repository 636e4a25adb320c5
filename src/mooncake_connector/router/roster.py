"""Keep what a policy sees of every engine ready for the next decision.

Pure: no sockets, threads or clocks. Not thread-safe; one owner.

Who may do what changes seldom, so it is worked out once per change of the table; a decision refreshes only what moves
with time and with the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mooncake_connector.router.engines import PREFERENCE, Engine, EngineTable
from mooncake_connector.router.load import DecodeLoad, PrefillLoad
from mooncake_connector.router.policy import Candidate, Sides, sides_of

MODELS_MAX = 64


class Row:
    """One engine: as the table has it, what it was given, and as a policy sees it."""

    __slots__ = ("candidate", "decode", "engine", "prefill")

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.prefill = PrefillLoad()
        self.decode = DecodeLoad()
        self.candidate = Candidate(engine.url, engine.role)

    def tell_role(self) -> None:
        """Copy to the candidate what changes with the table."""
        engine, candidate = self.engine, self.candidate
        candidate.role = engine.role
        # One that may not be used at all is in no group.
        candidate.preference = PREFERENCE.get(engine.state, len(PREFERENCE))
        candidate.has_connector = engine.has_connector
        candidate.capacity_tokens = engine.capacity_tokens
        candidate.kind = engine.kind
        candidate.runs_whole = engine.runs_whole

    def tell_load(self, now_ns: int) -> None:
        """Copy to the candidate what changes with the work that is out."""
        engine, candidate = self.engine, self.candidate
        candidate.queue_s = self.prefill.queue_s(now_ns / 1e9)
        candidate.context_tokens = self.decode.num_tokens
        if engine.has_fresh_report(now_ns):  # others use it too
            candidate.queue_s = max(candidate.queue_s, engine.reported_queue_s)
            candidate.context_tokens = max(candidate.context_tokens, engine.reported_context_tokens)
        candidate.num_open = engine.num_open
        candidate.num_placed = engine.num_placed
        candidate.outstanding_tokens = engine.outstanding_tokens(now_ns)


class Roster:
    """Every engine's row, and who may serve which model.

    Candidates are changed by the next :meth:`refresh`: nobody may keep one and expect it to stay.
    """

    def __init__(self, table: EngineTable) -> None:
        self._table = table
        self._version = -1
        self._rows: dict[str, Row] = {}
        self._sides: dict[str, Sides] = {}
        self._matched: list[Candidate] = []
        self._prefilling: list[Candidate] = []
        self._told_ns = 0
        self.num_decoding = 0
        self.decode_tokens = 0

    def row(self, url: str) -> Row | None:
        """Return an engine's row; None when it is not in the table."""
        self.catch_up()
        return self._rows.get(url)

    def sides(self, model: str) -> Sides:
        """Return who may serve a model."""
        self.catch_up()
        sides = self._sides.get(model)
        if sides is None:
            if len(self._sides) >= MODELS_MAX:
                self._sides.clear()
            rows = [each for each in self._rows.values() if each.engine.is_usable and each.engine.serves(model)]
            sides = self._sides[model] = sides_of([each.candidate for each in rows])
        return sides

    def candidates(self, engines: Iterable[Engine]) -> list[Candidate]:
        """Return these engines' candidates."""
        self.catch_up()
        return [self._rows[each.url].candidate for each in engines]

    def refresh(self, matches: Mapping[str, int], *, chunk_tokens: float, num_prompt_tokens: int, now_ns: int) -> None:
        """Bring every candidate up to date for one prompt.

        Args:
            matches: leading chunks of the prompt that engines hold; those that hold none may be left out.
            chunk_tokens: tokens of a chunk.
            num_prompt_tokens: no prefix is longer.
            now_ns: monotonic time.
        """
        self.catch_up()
        self._pass_time(now_ns)
        for candidate in self._matched:
            candidate.num_prefix_chunks = candidate.prefix_tokens = 0
        self._matched = []
        for url, num_chunks in matches.items():
            if (known := self._rows.get(url)) is not None:
                known.candidate.num_prefix_chunks = num_chunks
                known.candidate.prefix_tokens = min(int(num_chunks * chunk_tokens), num_prompt_tokens)
                self._matched.append(known.candidate)

    def touch(self, url: str, now_ns: int) -> None:
        """Notice that an engine was given work, or finished some."""
        row = self.row(url)
        if row is not None:
            row.tell_load(now_ns)

    def queues_s(self, now_ns: int) -> tuple[float, ...]:
        """Return for each engine that may prefill the predicted seconds until it could begin another request."""
        self.catch_up()
        self._pass_time(now_ns)
        return tuple([each.queue_s for each in self._prefilling])

    def _pass_time(self, now_ns: int) -> None:
        if now_ns == self._told_ns:
            return
        self._told_ns, now_s = now_ns, now_ns / 1e9
        for row in self._rows.values():
            if row.engine.reported_at_ns:
                row.tell_load(now_ns)
            elif row.candidate.queue_s:
                row.candidate.queue_s = row.prefill.queue_s(now_s)

    def catch_up(self) -> None:
        """Notice what changed in the table; the other methods do that themselves."""
        if self._version == self._table.version:
            return
        self._version = self._table.version
        # In the table's order, so that it does not matter in which order engines came and went.
        rows = {}
        for engine in self._table:
            known = self._rows.get(engine.url)
            # One that was removed and registered anew starts from nothing.
            row = rows[engine.url] = known if known is not None and known.engine is engine else Row(engine)
            row.tell_role()
            row.tell_load(self._told_ns)
        self._rows = rows
        self._sides = {}
        usable = [each for each in rows.values() if each.engine.is_usable]
        self._prefilling = [each.candidate for each in usable if each.engine.role != "decode"]
        sizes = [each.engine.capacity_tokens for each in usable if each.engine.role != "prefill"]
        self.num_decoding = len(sizes)
        self.decode_tokens = sum(sizes) if all(sizes) else 0
