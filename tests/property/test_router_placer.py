"""Whatever happens in whatever order, outstanding work is the sum of what is open, and nothing stays for ever."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mooncake_connector.router.engines import EngineEvent, EngineTable, Introduction
from mooncake_connector.router.messages import Place, Placed
from mooncake_connector.router.placer import OUTPUT_TOKENS_UNKNOWN, Placer
from mooncake_connector.router.prefix_index import PrefixIndex

URLS = [f"http://e:{number}" for number in range(5)]
TTL_NS = 50


class PlacerMachine(RuleBasedStateMachine):
    """Keeps, beside the placer, what each open placement should cost where."""

    def __init__(self) -> None:
        super().__init__()
        self.placer = Placer(EngineTable(), PrefixIndex(entries_max=8), ttl_ns=TTL_NS)
        self.open: dict[str, dict[str, tuple[str, int]]] = {}
        self.deadlines: dict[str, int] = {}
        self.now_ns = 0
        self.num_placed = 0
        for url, role in zip(URLS, ("prefill", "decode", "both"), strict=False):
            self.introduce(url, role, True)

    def introduce(self, url, role, has_connector) -> None:
        # Roles and processes may change; engines are not removed here, because that forgets their count on purpose.
        self.placer.table.add(url, role)
        addresses = ("tcp://x:1",) if has_connector else ()
        self.placer.introduce(url, Introduction(("m",), f"{url}{has_connector}", addresses))

    @rule(url=st.sampled_from(URLS), role=st.sampled_from(["prefill", "decode", "both"]), has_connector=st.booleans())
    def introduce_again(self, url, role, has_connector) -> None:
        self.introduce(url, role, has_connector)

    @rule(url=st.sampled_from(URLS), event=st.sampled_from([EngineEvent.HEALTHY, EngineEvent.FAILED, EngineEvent.LOST]))
    def observe(self, url, event) -> None:
        self.placer.table.observe(url, event)

    @rule(num_prompt=st.integers(0, 100), num_output=st.integers(0, 10), why=st.sampled_from(["", "", "echo"]),
          chain=st.lists(st.integers(0, 5), max_size=4), excluded=st.lists(st.sampled_from(URLS), max_size=2))
    def place(self, num_prompt, num_output, why, chain, excluded) -> None:
        self.num_placed += 1
        transfer_id = f"t{self.num_placed}"
        place = Place("r", num_prompt, num_output, "m", tuple(chain), tuple(excluded))
        placed = self.placer.place(place, transfer_id, now_ns=self.now_ns, colocated_reason=why)
        if not isinstance(placed, Placed):
            assert not any(each.is_usable and each.url not in excluded for each in self.placer.table)
            return
        assert placed.decode_url not in excluded and placed.prefill_url not in excluded
        assert placed.decode_url != placed.prefill_url
        assert bool(placed.prefill_url) == bool(placed.decode_params) == (not placed.reason)
        self.deadlines[transfer_id] = self.now_ns + TTL_NS
        legs = {"decode": (placed.decode_url, num_prompt + (num_output or OUTPUT_TOKENS_UNKNOWN))}
        if placed.prefill_url:
            legs["prefill"] = (placed.prefill_url, num_prompt)
        self.open[transfer_id] = legs

    @rule(data=st.data(), leg=st.sampled_from(["prefill", "decode", "both"]))
    def finish(self, data, leg) -> None:
        transfer_id = data.draw(st.sampled_from([*self.open, "unknown"]))
        assert self.placer.finish(transfer_id, leg) == (transfer_id in self.open)
        for name in ("prefill", "decode") if leg == "both" else (leg,):
            self.open.get(transfer_id, {}).pop(name, None)
        self.open = {each: legs for each, legs in self.open.items() if legs}

    @rule(data=st.data())
    def move_prefill(self, data) -> None:
        movable = [each for each, legs in self.open.items() if len(legs) == 2]
        if not movable:
            return
        transfer_id = data.draw(st.sampled_from(movable))
        url, tokens = self.open[transfer_id]["prefill"]
        moved = self.placer.place_prefill_again(transfer_id, excluded=url, now_ns=self.now_ns)
        if moved is None:
            self.placer.finish(transfer_id, "prefill")
            del self.open[transfer_id]["prefill"]
        else:
            assert moved.prefill_url not in (url, moved.decode_url)
            self.open[transfer_id]["prefill"] = (moved.prefill_url, tokens)

    @rule(step_ns=st.integers(1, 40))
    def pass_time(self, step_ns) -> None:
        self.now_ns += step_ns
        late = {each for each in self.open if self.deadlines[each] <= self.now_ns}
        assert set(self.placer.expire(self.now_ns)) == late
        for each in late:
            del self.open[each]

    @invariant()
    def work_is_the_sum_of_what_is_open(self) -> None:
        assert self.placer.num_open == len(self.open)
        for engine in self.placer.table:
            legs = [(name, tokens) for each in self.open.values() for name, (url, tokens) in each.items()
                    if url == engine.url]
            assert engine.prefill_tokens == sum(tokens for name, tokens in legs if name == "prefill")
            assert engine.decode_tokens == sum(tokens for name, tokens in legs if name == "decode")
            assert engine.num_open == len(legs)


PlacerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestPlacer = PlacerMachine.TestCase


class IndexMachine(RuleBasedStateMachine):
    """The index against a list in order of use: it may forget, by the rules, but never invents."""

    ENTRIES_MAX = 6

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(entries_max=self.ENTRIES_MAX)
        self.model: dict[str, list[int]] = {"a": [], "b": []}

    @rule(engine=st.sampled_from("ab"), chain=st.lists(st.integers(0, 9), max_size=9, unique=True))
    def insert(self, engine, chain) -> None:
        self.index.insert(engine, tuple(chain))
        kept = chain[: self.ENTRIES_MAX]
        known = [value for value in self.model[engine] if value not in kept] + kept[::-1]
        self.model[engine] = known[-self.ENTRIES_MAX :]

    @rule(engine=st.sampled_from("ab"))
    def forget(self, engine) -> None:
        self.index.forget(engine)
        self.model[engine] = []

    @rule(engine=st.sampled_from("ab"), chain=st.lists(st.integers(0, 9), max_size=9))
    def match(self, engine, chain) -> None:
        expected = next((at for at, value in enumerate(chain) if value not in self.model[engine]), len(chain))
        assert self.index.match(engine, tuple(chain)) == expected

    @invariant()
    def it_is_bounded(self) -> None:
        assert self.index.num_entries() == sum(len(known) for known in self.model.values())


IndexMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestPrefixIndex = IndexMachine.TestCase
