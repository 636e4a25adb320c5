"""An engine's account agrees with one that is kept the slow way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.router.load import OVERDUE_SHARE, DecodeLoad, PrefillLoad

steps = st.lists(st.tuples(st.sampled_from(["add", "finish"]), st.integers(0, 5), st.floats(0.01, 20),
                           st.floats(0, 5)), max_size=40)


@given(steps)
def test_a_queue_of_prefills(steps) -> None:
    load, now_s, begun_s = PrefillLoad(), 0.0, 0.0
    queue: list[tuple[str, float]] = []
    for what, number, predicted_s, gap_s in steps:
        now_s += gap_s
        name = str(number)
        known = [each for each, _ in queue]
        if what == "finish":
            assert load.finish(name, now_s=now_s) == (name in known)
            if known[:1] == [name]:
                begun_s = now_s
            queue = [each for each in queue if each[0] != name]
        elif name not in known:
            if not queue:
                begun_s = now_s
            load.add(name, predicted_s, now_s=now_s)
            queue.append((name, predicted_s))
        assert len(load) == len(queue)
        left_s = 0.0
        if queue:
            head_s = queue[0][1]
            left_s = max(head_s - (now_s - begun_s), OVERDUE_SHARE * head_s) + sum(each for _, each in queue[1:])
        assert load.queue_s(now_s) == pytest.approx(left_s, abs=1e-6)
        assert (load.queue_s(now_s) > 0) == bool(queue)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 1000)), max_size=40))
def test_memory_is_what_the_running_requests_were_given(steps) -> None:
    load = DecodeLoad()
    running: dict[str, int] = {}
    for is_new, number, num_tokens in steps:
        name = str(number)
        if not is_new:
            assert load.finish(name) == (running.pop(name, None) is not None)
        elif name not in running:
            load.add(name, num_tokens)
            running[name] = num_tokens
        assert len(load) == len(running) and load.num_tokens == sum(running.values())
