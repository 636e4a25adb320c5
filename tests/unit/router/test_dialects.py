"""What the router says to each engine and understands of it, without any."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.router.bodies import CHAT, COMPLETIONS, Ask, read_ask
from mooncake_connector.router.dialects.select import DIALECTS, dialect_of, recognise
from mooncake_connector.router.dialects.sglang import room_of
from mooncake_connector.router.engines import Engine, EngineTable, Introduction
from mooncake_connector.router.messages import Bootstrap, Placed
from mooncake_connector.router.policy import Candidate, choose_one, choose_pair

SGLANG, VLLM = DIALECTS["sglang"], DIALECTS["vllm"]
PAIR = Placed("r", "http://p:1", "http://d:1", "t", bootstrap=Bootstrap("p", 8998, 77))
INFO = {"disaggregation_mode": "prefill", "disaggregation_bootstrap_port": 8998, "random_seed": 1,
        "startup_time": {"load_model": 1.25}, "launch_command": "python -m sglang.launch_server"}


def ask(route=CHAT, **body) -> Ask:
    found = read_ask(route, json.dumps({"model": "m", "messages": [], "prompt": "abc", **body}).encode())
    assert isinstance(found, Ask)
    return found


@pytest.mark.parametrize(("card", "kind"), [
    ({"id": "m", "owned_by": "sglang"}, "sglang"), ({"id": "m", "owned_by": "vllm"}, "vllm"),
    ({"id": "m", "owned_by": "me"}, "vllm"), ({"id": "m"}, "vllm"), ({"id": "m", "owned_by": 7}, "vllm")])
def test_an_engine_is_known_by_its_model_card(card, kind) -> None:
    assert recognise(json.dumps(card).encode()) == kind


class TestSglang:
    @pytest.mark.parametrize(("mode", "half", "addresses"), [
        ("prefill", "prefill", ("10.0.0.1:8998",)), ("decode", "decode", ()), ("null", "", ())])
    def test_introduction(self, mode, half, addresses) -> None:
        answer = json.dumps({**INFO, "disaggregation_mode": mode}).encode()
        told = SGLANG.read_probe(answer, url="http://10.0.0.1:8101", models=("m",))
        assert told is not None
        assert (told.kind, told.half, told.addresses, told.has_connector) == ("sglang", half, addresses, bool(half))

    def test_another_life_has_another_id(self) -> None:
        lives = [SGLANG.read_probe(json.dumps({**INFO, **more}).encode(), url="http://a:1", models=("m",))
                 for more in ({}, {}, {"random_seed": 2}, {"startup_time": {"load_model": 1.26}})]
        ids = [life.engine_id for life in lives if life is not None]
        assert ids[0] == ids[1] and len(set(ids)) == 3

    @pytest.mark.parametrize("answer", [b"", b"{}", b"[]", b'{"disaggregation_mode": "both"}', b"\xff",
                                        b'{"disaggregation_mode": "prefill", "disaggregation_bootstrap_port": 65536}'])
    def test_an_answer_that_makes_no_sense(self, answer) -> None:
        assert SGLANG.read_probe(answer, url="http://a:1", models=("m",)) is None

    def test_both_legs_are_the_clients_body_with_the_meeting_point(self) -> None:
        wanted = {"max_tokens": 9, "temperature": 0.5, "logprobs": True, "min_tokens": 3, "seed": 4, "stop": ["x"]}
        request = ask(stream=True, stream_options={"include_usage": True}, **wanted)
        prefill, decode = (json.loads(body(request, PAIR)) for body in (SGLANG.prefill_body, SGLANG.decode_body))
        meeting = {"bootstrap_host": "p", "bootstrap_port": 8998, "bootstrap_room": 77}
        for leg in (prefill, decode):
            assert wanted.items() <= leg.items() and meeting.items() <= leg.items()
        assert prefill["stream"] is False and "stream_options" not in prefill
        assert decode["stream"] is True and decode["stream_options"] == {"include_usage": True}

    @given(st.text(max_size=40), st.text(max_size=40))
    def test_rooms_are_63_bits_and_differ(self, one: str, other: str) -> None:
        assert 0 <= room_of(one) < 1 << 63
        assert (room_of(one) == room_of(other)) is (one == other)

    @pytest.mark.parametrize(("first", "failure"), [
        (b'data: {"error": {"message": "gone", "code": 500}}\n\ndata: [DONE]\n\n', (500, "gone")),
        (b'data: {"error": {"message": "long", "code": 400}}\n\n', (400, "long")),
        (b'data: {"error": {"mess', None), (b'data: {"id": "error"}\n\n', None), (b"", None),
        (b'data: {"id": 1, "choices": [{"text": "{\\"error\\": 1}"}]}\n\n', None)])
    def test_an_error_in_place_of_the_first_token(self, first, failure) -> None:
        assert SGLANG.stream_failure(first) == failure


def test_clients_cannot_name_a_meeting_point() -> None:
    theirs = {"bootstrap_host": "evil", "bootstrap_port": 1, "bootstrap_room": 2, "disagg_prefill_dp_rank": 3,
              "kv_transfer_params": {"do_remote_prefill": True}}
    whole = Placed("r", "", "http://d:1", "t", reason="n")
    for dialect in DIALECTS.values():
        assert not theirs.keys() & json.loads(dialect.decode_body(ask(COMPLETIONS, **theirs), whole)).keys()
    assert json.loads(SGLANG.decode_body(ask(**theirs), PAIR))["bootstrap_host"] == "p"
    assert dialect_of(PAIR) is SGLANG and dialect_of(whole) is VLLM


class TestChoosing:
    def half(self, url, role, **more) -> Candidate:
        return Candidate(url, role, kind="sglang", runs_whole=False, **more)

    def test_a_pair_is_of_one_kind(self) -> None:
        choice = choose_pair([Candidate("vp", "prefill", outstanding_tokens=5), self.half("sp", "prefill"),
                              Candidate("vd", "decode"), self.half("sd", "decode", outstanding_tokens=9)])
        assert choice and choice.prefill and (choice.prefill.url, choice.decode.url) == ("sp", "sd")

    def test_an_engine_without_a_partner_of_its_kind_is_passed_over(self) -> None:
        choice = choose_pair([self.half("sp", "prefill"), Candidate("vp", "prefill", outstanding_tokens=5),
                              Candidate("vd", "decode")])
        assert choice and choice.prefill and (choice.prefill.url, choice.decode.url) == ("vp", "vd")

    def test_halves_never_run_whole_requests(self) -> None:
        halves = [self.half("p", "prefill"), self.half("d", "decode")]
        assert choose_one(halves, reason="n") is None
        assert choose_pair(halves[:1]) is None and choose_pair(halves[1:]) is None
        choice = choose_pair([halves[1], Candidate("w", "both", kind="sglang", has_connector=False)])
        assert choice and (choice.prefill, choice.decode.url) == (None, "w")

    def test_halves_are_paired_even_as_a_last_resort(self) -> None:
        choice = choose_pair([self.half("p", "prefill", preference=2), self.half("d", "decode", preference=2)])
        assert choice and choice.prefill and choice.prefill.url == "p"
        both = [self.half("p", "prefill", preference=2), self.half("d", "decode", preference=2),
                Candidate("vp", "prefill"), Candidate("vd", "decode")]
        choice = choose_pair(both)
        assert choice and choice.prefill and choice.prefill.url == "vp", "a healthy pair first"

    @given(st.lists(st.tuples(st.sampled_from(("prefill", "decode", "both")), st.integers(0, 2), st.booleans(),
                              st.sampled_from(("vllm", "sglang"))), max_size=6))
    def test_whatever_there_is_a_choice_is_one_that_works_and_is_made_if_there_is_one(self, rows) -> None:
        candidates = [
            Candidate(f"http://e:{port}", role, preference, kind=kind, has_connector=has_connector or is_half,
                      runs_whole=not is_half)
            for port, (role, preference, has_connector, kind) in enumerate(rows)
            for is_half in [kind == "sglang" and role != "both"]]
        choice = choose_pair(candidates)
        pairs = [(one, other) for one in candidates for other in candidates
                 if one.url != other.url and one.kind == other.kind and one.role != "decode" and other.role != "prefill"
                 and one.has_connector and one.is_worth_a_pair and other.is_worth_a_pair]
        if choice is None:
            assert not pairs and not any(each.runs_whole for each in candidates)
        elif choice.prefill is None:
            assert choice.decode.runs_whole
        else:
            assert (choice.prefill, choice.decode) in pairs


def test_a_server_takes_the_role_of_its_half_and_keeps_it() -> None:
    table = EngineTable()
    engine: Engine = table.add("http://e:1", "both")
    table.introduce("http://e:1", Introduction(("m",), "id", kind="sglang", half="decode"))
    assert (engine.role, engine.kind, engine.runs_whole, engine.has_connector) == ("decode", "sglang", False, True)
    assert table.add("http://e:1", "both").role == "decode"
