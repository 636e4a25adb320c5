"""Policy, engine table, prefix index and placer, each alone."""

from __future__ import annotations

import pytest

from mooncake_connector.router.engines import (
    ENGINES_MAX,
    REPORT_FRESH_NS,
    TRANSITIONS,
    EngineEvent,
    EngineState,
    EngineTable,
    Introduction,
)
from mooncake_connector.router.messages import Place, Placed, Refused, Role
from mooncake_connector.router.placer import Placer
from mooncake_connector.router.policy import Candidate, choose_one, choose_pair, choose_prefill
from mooncake_connector.router.prefix_index import CHUNK_BYTES, CHUNKS_MAX, PrefixIndex, prompt_chain
from mooncake_connector.router.recovery import Patience, recovery_wait_s
from mooncake_store.errors import CapacityExceeded, LocalProtocolError


def candidate(url: str, role: Role = "both", *, preference: int = 0, tokens: int = 0, prefix: int = 0, placed: int = 0,
              has_connector: bool = True) -> Candidate:
    return Candidate(url, role, preference, tokens, prefix, placed, has_connector)


class TestPolicy:
    def test_least_work_comes_before_prefix_and_prefix_before_turns(self) -> None:
        assert choose_prefill([candidate("a", tokens=2, prefix=9), candidate("b", tokens=1)]).engine.url == "b"  # type: ignore[union-attr]
        assert choose_prefill([candidate("a", prefix=1), candidate("b", prefix=2, placed=5)]).engine.url == "b"  # type: ignore[union-attr]
        assert choose_prefill([candidate("a", placed=5), candidate("b", placed=4)]).engine.url == "b"  # type: ignore[union-attr]

    def test_a_healthier_engine_comes_first_whatever_its_load(self) -> None:
        choice = choose_pair([candidate("p", "prefill"), candidate("a", "decode", preference=1),
                              candidate("b", "decode", tokens=10**9)])
        assert choice and choice.decode.url == "b"

    def test_an_engine_is_never_paired_with_itself(self) -> None:
        choice = choose_pair([candidate("a"), candidate("b")])
        assert choice and choice.prefill and {choice.prefill.url, choice.decode.url} == {"a", "b"}
        choice = choose_pair([candidate("a")])
        assert choice and choice.prefill is None and choice.decode.url == "a"

    @pytest.mark.parametrize(
        ("candidates", "decode", "reason"),
        [
            ([candidate("d", "decode")], "d", "no_prefill"),
            ([candidate("p", "prefill", has_connector=False), candidate("d", "decode")], "d", "no_prefill"),
            ([candidate("p", "prefill", preference=2), candidate("d", "decode")], "d", "no_prefill"),
            ([candidate("p", "prefill"), candidate("d", "decode", has_connector=False)], "d", "no_connector"),
            ([candidate("p", "prefill")], "p", "no_decode"),
            ([candidate("p", "prefill"), candidate("d", "decode", preference=2)], "p", "no_decode"),
            ([candidate("p", "prefill", preference=2), candidate("d", "decode", preference=2, tokens=1)], "p",
             "no_prefill"),
        ],
    )
    def test_when_no_pair_can_be_made_one_engine_does_both(self, candidates, decode, reason) -> None:
        choice = choose_pair(candidates)
        assert choice and (choice.prefill, choice.decode.url, choice.reason) == (None, decode, reason)

    def test_nobody(self) -> None:
        assert choose_pair([]) is None and choose_one([], reason="n") is None and choose_prefill([]) is None


class TestEngineTable:
    def test_every_state_answers_every_event(self) -> None:
        assert set(TRANSITIONS) == set(EngineState)
        assert all(set(row) == set(EngineEvent) for row in TRANSITIONS.values())

    def test_only_an_introduction_leads_back_to_work(self) -> None:
        for state in (EngineState.UNKNOWN, EngineState.SUSPECT, EngineState.DOWN):
            assert TRANSITIONS[state][EngineEvent.HEALTHY] is state
            if state is not EngineState.UNKNOWN:
                assert TRANSITIONS[state][EngineEvent.INTRODUCED] is EngineState.INTRODUCED

    def test_life(self) -> None:
        table = EngineTable()
        engine = table.add("http://e:1", "both")
        assert not engine.is_usable
        assert table.introduce(engine.url, Introduction(("m",), "one", ("tcp://a:1",))) is False
        assert engine.is_usable and engine.has_connector and engine.serves("m") and not engine.serves("x")
        transition = table.observe(engine.url, EngineEvent.HEALTHY)
        assert transition and transition.is_change and engine.state is EngineState.UP
        table.observe(engine.url, EngineEvent.LOST)
        assert not engine.is_usable
        assert table.introduce(engine.url, Introduction(("m",), "two", ("tcp://a:1",))) is True
        assert table.count()[EngineState.INTRODUCED] == 1
        assert table.remove(engine.url) and not table.remove(engine.url)
        assert table.observe(engine.url, EngineEvent.LOST) is None
        with pytest.raises(LocalProtocolError):
            table.observe(engine.url, EngineEvent.INTRODUCED)

    def test_a_report_counts_while_it_is_fresh(self) -> None:
        table = EngineTable()
        engine = table.add("http://e:1", "both")
        assert table.report(engine.url, tokens=50, now_ns=1000) and not table.report("http://x:1", tokens=1, now_ns=1)
        engine.prefill_tokens = 20
        assert engine.outstanding_tokens(1000 + REPORT_FRESH_NS) == 50
        assert engine.outstanding_tokens(1001 + REPORT_FRESH_NS) == 20
        engine.prefill_tokens = 70
        assert engine.outstanding_tokens(1000) == 70

    def test_it_is_bounded(self) -> None:
        table = EngineTable()
        for number in range(ENGINES_MAX):
            table.add(f"http://e:{number}", "both")
        table.add("http://e:1", "decode")
        with pytest.raises(CapacityExceeded):
            table.add("http://one.more:1", "both")


class TestPrefixIndex:
    def test_a_chain_shares_what_the_prompts_share(self) -> None:
        prompt = bytes(range(256)) * 4
        chain = prompt_chain(b"m", prompt)
        assert len(chain) == 4 == len(set(chain))
        assert prompt_chain(b"m", prompt + b"tail") == chain
        assert prompt_chain(b"m", prompt[: 2 * CHUNK_BYTES] + b"x" * 2 * CHUNK_BYTES)[:2] == chain[:2]
        assert not set(prompt_chain(b"other", prompt)) & set(chain)
        assert prompt_chain(b"m", b"short") == ()
        assert len(prompt_chain(b"m", b"a" * CHUNK_BYTES * (CHUNKS_MAX + 5))) == CHUNKS_MAX

    def test_the_start_of_a_prefix_outlives_its_end(self) -> None:
        index = PrefixIndex(entries_max=4)
        index.insert("e", (1, 2, 3))
        index.insert("e", (9, 8))
        assert index.num_entries() == 4
        assert index.match("e", (1, 2, 3)) == 2
        index.insert("e", tuple(range(100, 200)))
        assert index.num_entries() == 4 and index.match("e", (100, 101, 102, 103, 104)) == 4
        index.forget("e")
        assert index.match("e", (100,)) == 0 and index.engines() == ()


def placer_with(*engines: tuple[str, Role]) -> Placer:
    table = EngineTable()
    placer = Placer(table, PrefixIndex(), ttl_ns=1000)
    for url, role in engines:
        table.add(url, role)
        placer.introduce(url, Introduction(("m",), f"id-{url}", (f"tcp://{url}",)))
        table.observe(url, EngineEvent.HEALTHY)
    return placer


class TestPlacer:
    def test_a_known_prefix_breaks_the_tie(self) -> None:
        placer = placer_with(("p1", "prefill"), ("p2", "prefill"), ("d", "decode"))
        seen = []
        for number, chain in enumerate(((1, 2), (5, 6), (1, 2, 3), (5, 6, 7), (1, 9))):
            placed = placer.place(Place("r", 10, prefix_hashes=chain), f"t{number}", now_ns=0)
            assert isinstance(placed, Placed)
            placer.finish(placed.transfer_id)
            seen.append(placed.prefill_url)
        assert seen[2] == seen[4] == seen[0] != seen[1] == seen[3]

    def test_a_new_process_knows_no_prefix(self) -> None:
        placer = placer_with(("p", "prefill"), ("d", "decode"))
        placer.place(Place("r", 10, prefix_hashes=(1,)), "t", now_ns=0)
        assert placer._index.match("p", (1,)) == 1
        assert placer.introduce("p", Introduction(("m",), "another", ("tcp://p",)))
        assert placer._index.match("p", (1,)) == 0

    def test_refusals_say_why(self) -> None:
        placer = placer_with(("p", "prefill"), ("d", "decode"))
        no_model = placer.place(Place("r", 1, model="x"), "t", now_ns=0)
        assert isinstance(no_model, Refused) and no_model.code == "no_model" and "m" in no_model.reason
        nobody = placer.place(Place("r", 1, excluded=("p", "d")), "t", now_ns=0)
        assert isinstance(nobody, Refused) and nobody.code == "no_engine"
        empty = placer_with().place(Place("r", 1), "t", now_ns=0)
        assert isinstance(empty, Refused) and empty.code == "no_engine"

    def test_it_is_bounded_and_expires(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mooncake_connector.router.placer.OPEN_PLACEMENTS_MAX", 2)
        placer = placer_with(("p", "prefill"), ("d", "decode"))
        assert isinstance(placer.place(Place("r", 1), "t1", now_ns=0), Placed)
        assert isinstance(placer.place(Place("r", 1), "t2", now_ns=5), Placed)
        full = placer.place(Place("r", 1), "t3", now_ns=0)
        assert isinstance(full, Refused) and full.code == "full"
        assert placer.expire(1000) == ["t1"]
        assert placer.num_open == 1

    def test_moving_a_prefill_moves_its_work(self) -> None:
        placer = placer_with(("p1", "prefill"), ("p2", "prefill"), ("d", "decode"))
        placed = placer.place(Place("r", 10), "t", now_ns=0)
        assert isinstance(placed, Placed) and placed.prefill_url == "p1"
        moved = placer.place_prefill_again("t", excluded="p1", now_ns=0)
        assert moved and moved.prefill_url == "p2" and moved.decode_params
        assert moved.decode_params.remote_engine_id == "id-p2"
        assert [each.prefill_tokens for each in placer.table] == [0, 10, 0]
        assert placer.place_prefill_again("t", excluded="p2", now_ns=0).prefill_url == "p1"  # type: ignore[union-attr]
        placer.table.observe("p2", EngineEvent.LOST)
        assert placer.place_prefill_again("t", excluded="p1", now_ns=0) is None
        assert placer.place_prefill_again("no such", excluded="p1", now_ns=0) is None


def test_how_long_to_wait_for_a_decode_engine() -> None:
    patience = Patience(10.0, 1.0, 0.1)
    assert recovery_wait_s(patience, is_refusal=False, is_stream=True, num_output_tokens=100) == 10
    assert recovery_wait_s(patience, is_refusal=True, is_stream=True, num_output_tokens=100) == 1
    assert recovery_wait_s(patience, is_refusal=False, is_stream=False, num_output_tokens=100) == 20
    assert recovery_wait_s(patience, is_refusal=True, is_stream=False, num_output_tokens=0) > 20
