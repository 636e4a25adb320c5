"""Runs save probes and never claim a block that is gone."""

import pytest

from mooncake_store.directory.runs import PATIENCE, RUN_KEYS, RunIndex
from mooncake_store.testing.directory import make_keys

KEYS = tuple(make_keys(256))


class Known:
    """Counts probes."""

    def __init__(self, keys):
        self.keys = set(keys)
        self.num_probes = 0

    def __contains__(self, key):
        self.num_probes += 1
        return key in self.keys


@pytest.fixture
def index():
    index = RunIndex()
    index.add(KEYS)
    return index


def test_a_prompt_published_in_order_costs_no_probe(index):
    known = Known(KEYS)
    assert index.match(KEYS, known) == 256
    assert known.num_probes == 0
    assert index.match(KEYS[RUN_KEYS:], known) == 256 - RUN_KEYS
    assert known.num_probes == 0


def test_an_unaligned_prompt_probes_up_to_the_next_run(index):
    known = Known(KEYS)
    assert index.match(KEYS[3:], known) == 253
    assert known.num_probes == RUN_KEYS - 3


def test_a_prompt_that_leaves_a_run_is_probed_to_its_end(index):
    known = Known(KEYS)
    assert index.match((*KEYS[:40], *make_keys(20, "other")), known) == 40
    assert known.num_probes == 8 + 1


def test_without_runs_it_gives_up_looking_for_them():
    known = Known(KEYS)
    assert RunIndex().match(KEYS, known) == 256
    assert known.num_probes == 256
    assert PATIENCE < 256


def test_the_last_of_two_pages_that_begin_alike_is_kept(index):
    other = (*KEYS[:4], *make_keys(RUN_KEYS, "other"))
    index.add(other)
    index.remove(KEYS)
    assert len(index) == 1
    assert index.match(other[:RUN_KEYS], Known(())) == RUN_KEYS
    index.remove(other)
    assert len(index) == 0


def test_short_pages_have_no_runs():
    index = RunIndex()
    index.add(KEYS[: RUN_KEYS - 1])
    assert len(index) == 0
