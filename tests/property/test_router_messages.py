"""Whatever arrives on the placement socket or as a body: an answer or a reasoned rejection, never a crash."""

from __future__ import annotations

import json

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake_connector.router.answers import Problem, is_finished_stream, problem_event, problem_json
from mooncake_connector.router.bodies import CHAT, COMPLETIONS, Ask, decode_body, hide_params, prefill_body, read_ask
from mooncake_connector.router.messages import (
    DecodeParams,
    Finished,
    LoadReport,
    Place,
    PrefillParams,
    Register,
    decode_answer,
    decode_question,
    encode,
)
from mooncake_store.errors import RemoteProtocolError

unhurried = settings(deadline=None, max_examples=200)
urls = st.integers(1, 65_535).map(lambda port: f"http://10.0.0.1:{port}")
names = st.text(min_size=1, max_size=40)
tokens = st.integers(0, 1 << 40)
questions = st.one_of(
    st.builds(Register, urls, st.sampled_from(["prefill", "decode", "both"]), st.text(max_size=20),
              st.text(max_size=20), st.lists(names, max_size=4).map(tuple)),
    st.builds(Place, names, tokens, tokens, st.text(max_size=20),
              st.lists(st.integers(0, 2**64 - 1), max_size=20).map(tuple), st.lists(urls, max_size=4).map(tuple)),
    st.builds(LoadReport, urls, tokens, tokens),
    st.builds(Finished, names, st.sampled_from(["ok", "failed", "aborted"]), st.sampled_from(["prefill", "both"])),
)  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(questions)
@unhurried
def test_every_question_survives_the_wire(question) -> None:
    assert decode_question(encode(question)) == question


@given(st.binary(max_size=300))
@unhurried
def test_any_bytes_are_a_message_or_rejected(data: bytes) -> None:
    for frame in (data, b"\x01" + data):
        for decode in (decode_question, decode_answer):
            try:
                decode(frame)
            except RemoteProtocolError as error:
                assert error.message


@given(questions, st.data())
@unhurried
def test_a_damaged_question_is_a_message_or_rejected(question, data: st.DataObject) -> None:
    frame = bytearray(encode(question))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frame)))
    try:
        decode_question(bytes(frame[:cut]))
    except RemoteProtocolError as error:
        assert error.message


@given(st.sampled_from([CHAT, COMPLETIONS]), st.binary(max_size=200))
@unhurried
def test_any_body_is_an_ask_or_a_problem(route, data: bytes) -> None:
    result = read_ask(route, data)
    assert isinstance(result, Ask) or (result.status == 400 and result.message)


@given(
    st.sampled_from([CHAT, COMPLETIONS]),
    st.dictionaries(st.sampled_from(["n", "stream", "model", "max_tokens", "echo", "prompt", "messages", "best_of",
                                     "prompt_logprobs", "prompt_embeds", "anything"]), json_values),
)  # fmt: skip
@unhurried
def test_what_the_router_does_not_own_reaches_the_engines_unchanged(route, body) -> None:
    ask = read_ask(route, json.dumps(body).encode())
    if isinstance(ask, Problem):
        return
    prefill = json.loads(prefill_body(ask, PrefillParams(True, False, "t")))
    decode = json.loads(decode_body(ask, DecodeParams(True, False, "t", "e", ("a",))))
    plain = json.loads(decode_body(ask, None))
    assert plain == body
    assert decode.pop("kv_transfer_params")["transfer_id"] == prefill["kv_transfer_params"]["transfer_id"] == "t"
    assert decode == body
    assert prefill["max_tokens"] == 1 and prefill["stream"] is False
    for name in ("model", "prompt", "messages", "prompt_embeds", "anything"):
        assert (name in prefill) == (name in body) and prefill.get(name) == body.get(name)


@given(st.sampled_from([400, 404, 413, 418, 500, 502, 503]), st.text(max_size=5000), st.binary(max_size=40))
@unhurried
def test_problems_are_valid_json_and_close_the_event_before_them(status: int, message: str, tail: bytes) -> None:
    problem = Problem(status, message)
    assert json.loads(problem_json(problem))["error"]["code"] == status
    stream = tail + problem_event(problem, tail=tail)
    assert stream.endswith(b"\n\ndata: [DONE]\n\n") and is_finished_stream(stream)
    last, done, _ = stream.rsplit(b"\n\n", 2)
    assert done == b"data: [DONE]"
    assert json.loads(last.rsplit(b"data: ", 1)[1])["error"]["code"] == status


@given(json_values, st.booleans())
@unhurried
def test_addresses_are_hidden_and_the_rest_of_an_answer_is_not(value, is_indented: bool) -> None:
    answer = {"id": "x", "kv_transfer_params": {"remote_addresses": ["tcp://1"]}, "choices": value}
    hidden = hide_params(json.dumps(answer).encode() if is_indented else msgspec.json.encode(answer))
    assert json.loads(hidden) == {**answer, "kv_transfer_params": None}
