"""Share one set of engines between all tests of a session: starting them takes a minute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.cluster import Fleet


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Yield a running float32 cell with a lone engine beside it."""
    fleet = Fleet(tmp_path_factory.mktemp("float32"), "float32")
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.close()


@pytest.fixture(scope="session")
def fleet_bfloat16(tmp_path_factory: pytest.TempPathFactory, fleet: Fleet) -> Iterator[Fleet]:
    """Yield bfloat16 engines in the same cell: other fingerprints, so nothing may be shared with float32 ones."""
    other = Fleet(tmp_path_factory.mktemp("bfloat16"), "bfloat16", shared=fleet)
    try:
        other.start()
        yield other
    finally:
        other.close()


@pytest.fixture
def healthy(fleet: Fleet) -> Iterator[Fleet]:
    """Yield the float32 cell with every process alive; afterwards nothing may be held."""
    fleet.heal()
    yield fleet
    fleet.heal()
    fleet.assert_nothing_held()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what needs few engines first: all of them at once do not fit into the memory of a test machine."""
    def weight(item: pytest.Item) -> int:
        fixtures = getattr(item, "fixturenames", ())
        return ("fleet" in fixtures) + ("fleet_bfloat16" in fixtures)

    here = [item for item in items if "tests/engine/" in item.nodeid]
    ordered = iter(sorted(here, key=weight))
    items[:] = [next(ordered) if item in here else item for item in items]
