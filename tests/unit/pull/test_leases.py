"""The lease table: promises end exactly once, and only for whom they were made."""

from __future__ import annotations

import random

from mooncake_store.pull.leases import LeaseTable


def test_a_lease_ends_once_by_release_or_by_time():
    table = LeaseTable()
    first = table.grant(1, ("x",), deadline_ns=10)
    second = table.grant(1, ("y",), deadline_ns=20)
    assert table.release(1, first).blocks == ("x",) and table.release(1, first) is None
    assert table.expire(19) == [] and [lease.lease_id for lease in table.expire(20)] == [second]
    assert table.release(1, second) is None and len(table) == 0 and table.next_deadline_ns() is None


def test_another_connection_can_neither_renew_nor_release():
    table = LeaseTable()
    lease = table.grant(1, (), deadline_ns=10)
    assert table.release(2, lease) is None and not table.renew(2, lease, deadline_ns=99)
    assert [ended.lease_id for ended in table.expire(10)] == [lease]


def test_renewal_prolongs_and_never_shortens():
    table = LeaseTable()
    lease = table.grant(1, (), deadline_ns=100)
    assert table.renew(1, lease, deadline_ns=50) and table.expire(99) == []
    assert table.renew(1, lease, deadline_ns=300) and table.expire(200) == []
    assert len(table.expire(300)) == 1 and not table.renew(1, lease, deadline_ns=400)


def test_both_bounds_hold_and_room_comes_back():
    table = LeaseTable(max_leases=3, max_per_peer=2)
    leases = [table.grant(1, (), deadline_ns=10) for _ in range(2)]
    assert not table.has_room(1) and table.has_room(2)
    table.grant(2, (), deadline_ns=10)
    assert not table.has_room(3)
    table.release(1, leases[0])
    assert table.has_room(1) and table.has_room(3)
    assert len(table.clear()) == 2 and len(table) == 0


def test_against_a_model_with_many_renewals():
    rng, table, model = random.Random(1), LeaseTable(), {}
    for now_ns in range(2000):
        roll = rng.random()
        if roll < 0.3 or not model:
            model[table.grant(1, (), deadline_ns=now_ns + 50)] = now_ns + 50
        elif roll < 0.9:
            lease = rng.choice(list(model))
            assert table.renew(1, lease, deadline_ns=now_ns + 50)
            model[lease] = now_ns + 50
        else:
            lease = rng.choice(list(model))
            assert table.release(1, lease) is not None
            del model[lease]
        ended = {lease.lease_id for lease in table.expire(now_ns)}
        assert ended == {lease for lease, deadline in model.items() if deadline <= now_ns}
        for lease in ended:
            del model[lease]
        assert len(table._due) <= 4 * len(model) + 65, "renewals must not pile up"
