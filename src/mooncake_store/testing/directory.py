"""Check that an implementation of the directory keeps its contract: a kit of tests to inherit from.

Subclass :class:`DirectoryTests` in a test module, say how to open a directory and how to let one die, and pytest runs
the rest::

    class TestMyDirectory(DirectoryTests):
        def open_directory(self, cell: str, metrics: Metrics) -> Directory:
            return MyDirectory(cell, ttl_s=self.ttl_s, metrics=metrics)

        def kill(self, directory: Directory) -> None:
            directory.stop_without_leaving()
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence

from mooncake_store.directory.base import Directory
from mooncake_store.errors import LocalProtocolError
from mooncake_store.metrics import Metrics
from mooncake_store.types import BlockKey, HostIdentity, Member, NodeId, block_key


def make_keys(num_keys: int, salt: str = "") -> list[BlockKey]:
    """Return keys that look like an engine's: one namespace, 32-byte hashes."""
    namespace = hashlib.sha256(b"namespace").digest()[:16]
    return [block_key(namespace, 0, hashlib.sha256(f"{salt}/{index}".encode()).digest()) for index in range(num_keys)]


def make_member(node_id: str, *, kind: str = "engine", capacity_bytes: int = 1 << 20) -> Member:
    """Return the announcement of a member on this host."""
    return Member(
        node_id=NodeId(node_id),
        kind=kind,
        control="tcp://127.0.0.1:40123",
        host=HostIdentity("00000000-0000-0000-0000-000000000000", 4026531836),
        pid=os.getpid(),
        capacity_bytes=capacity_bytes,
        version="0",
    )


def wait_until(is_met: Callable[[], bool], timeout_s: float) -> bool:
    """Ask every 10 ms until ``is_met``; False on timeout."""
    deadline = time.monotonic() + timeout_s
    while not is_met():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def raises(error: type[Exception], call: Callable[[], object]) -> bool:
    """Return whether ``call`` raises ``error``."""
    try:
        call()
    except error:
        return True
    return False


class DirectoryTests:
    """The contract of :class:`~mooncake_store.directory.base.Directory`, one test per clause.

    Attributes:
        ttl_s: membership TTL to open directories with; short, so that the tests are.
        reaction_s: upper bound for anything that should happen at once.
    """

    ttl_s = 2
    reaction_s = 5.0

    def open_directory(self, cell: str, metrics: Metrics) -> Directory:
        """Return a new directory of this cell. To be overridden."""
        raise NotImplementedError

    def kill(self, directory: Directory) -> None:
        """Let a directory die without leaving its cell. To be overridden."""
        raise NotImplementedError

    # ------------------------------------------------------------------ set-up

    def setup_method(self) -> None:
        """Begin a test in a cell of its own."""
        self.cell = f"kit-{uuid.uuid4().hex[:12]}"
        self.opened: list[Directory] = []

    def teardown_method(self) -> None:
        """Close what the test opened."""
        for directory in self.opened:
            directory.close()

    def reader(self, cell: str = "", metrics: Metrics | None = None) -> Directory:
        """Return an open directory that has not joined."""
        directory = self.open_directory(cell or self.cell, metrics or Metrics())
        self.opened.append(directory)
        return directory

    def node(self, node_id: str, cell: str = "") -> Directory:
        """Return an open directory that has joined."""
        directory = self.reader(cell)
        directory.join(make_member(node_id))
        assert directory.flush(self.reaction_s)
        return directory

    def sync(self, writer: Directory, *readers: Directory) -> None:
        """Make the readers see what the writer wrote."""
        assert writer.flush(self.reaction_s)
        for reader in readers:
            assert reader.wait_revision(writer.revision(), self.reaction_s)

    def publish(self, writer: Directory, keys: Sequence[BlockKey], *readers: Directory) -> None:
        """Publish and make the readers see it."""
        writer.publish(keys)
        self.sync(writer, writer, *readers)

    # ------------------------------------------------------------------ blocks

    def test_a_published_block_is_found_by_others(self) -> None:
        """Publish on one, locate and match on another."""
        writer, reader = self.node("a"), self.reader()
        keys = make_keys(5)
        self.publish(writer, keys, reader)
        assert reader.locate(keys) == [("a",)] * 5
        assert reader.match(keys) == 5

    def test_unknown_blocks_are_misses(self) -> None:
        """Locate gives an empty tuple, match zero; no keys is no error."""
        reader = self.reader()
        assert reader.locate(make_keys(2)) == [(), ()]
        assert reader.match(make_keys(2)) == 0
        assert reader.locate([]) == []
        assert reader.match([]) == 0

    def test_match_ends_at_the_first_gap(self) -> None:
        """Later blocks do not count."""
        writer = self.node("a")
        keys = make_keys(6)
        self.publish(writer, keys[:3] + keys[4:])
        assert writer.match(keys) == 3
        assert writer.match(keys[4:]) == 2
        assert writer.match(keys[3:]) == 0

    def test_locate_answers_in_the_order_asked(self) -> None:
        """Reversed and repeated keys included."""
        first, second = self.node("a"), self.node("b")
        keys = make_keys(4)
        self.publish(first, keys[:2])
        self.publish(second, keys[2:], first)
        asked = [keys[3], keys[0], keys[3], keys[1]]
        assert first.locate(asked) == [("b",), ("a",), ("b",), ("a",)]

    def test_publishing_twice_is_publishing_once(self) -> None:
        """Repeated keys, in one call and in several, vanish with one withdrawal."""
        writer, reader = self.node("a"), self.reader()
        keys = make_keys(3)
        writer.publish([*keys, *keys])
        self.publish(writer, keys, reader)
        assert reader.locate(keys) == [("a",)] * 3
        writer.withdraw(keys)
        self.sync(writer, reader)
        assert reader.locate(keys) == [()] * 3

    def test_withdraw_takes_exactly_those(self) -> None:
        """Unknown keys are ignored; a withdrawn key may be published again."""
        writer, reader = self.node("a"), self.reader()
        keys = make_keys(300)
        self.publish(writer, keys, reader)
        writer.withdraw([*keys[100:200], *make_keys(3, "unknown")])
        self.sync(writer, reader)
        assert [bool(holders) for holders in reader.locate(keys)] == [True] * 100 + [False] * 100 + [True] * 100
        self.publish(writer, keys[150:160], reader)
        assert reader.locate(keys[149:161]) == [(), *[("a",)] * 10, ()]

    def test_a_block_may_have_many_replicas(self) -> None:
        """Each holder is named once; one withdrawal leaves the others."""
        nodes = [self.node(f"n{index}") for index in range(4)]
        keys = make_keys(3)
        for node in nodes:
            self.publish(node, keys, nodes[0])
        assert [sorted(holders) for holders in nodes[0].locate(keys)] == [["n0", "n1", "n2", "n3"]] * 3
        nodes[2].withdraw(keys[:1])
        self.sync(nodes[2], nodes[0])
        assert [sorted(holders) for holders in nodes[0].locate(keys[:2])] == [
            ["n0", "n1", "n3"],
            ["n0", "n1", "n2", "n3"],
        ]

    def test_ten_thousand_blocks(self) -> None:
        """Many pages: all are found, half are withdrawn, the other half stays."""
        writer, reader = self.node("a"), self.reader()
        keys = make_keys(10_000)
        self.publish(writer, keys, reader)
        assert reader.match(keys) == 10_000
        writer.withdraw(keys[::2])
        self.sync(writer, reader)
        assert [bool(holders) for holders in reader.locate(keys)] == [False, True] * 5_000
        assert reader.health().num_blocks == 5_000

    def test_the_last_of_publish_and_withdraw_wins(self) -> None:
        """Faster than any batch."""
        writer, reader = self.node("a"), self.reader()
        key = make_keys(1)
        for _ in range(20):
            writer.publish(key)
            writer.withdraw(key)
        self.sync(writer, reader)
        assert reader.locate(key) == [()]
        self.publish(writer, key, reader)
        assert reader.locate(key) == [("a",)]

    # ------------------------------------------------------------------ members

    def test_members_are_seen_with_their_announcement(self) -> None:
        """Joining again replaces it."""
        first, second = self.node("a"), self.node("b")
        self.sync(second, first)
        assert first.members() == {"a": make_member("a"), "b": make_member("b")}
        changed = make_member("b", kind="store", capacity_bytes=7)
        second.join(changed)
        self.sync(second, first)
        assert first.members()[NodeId("b")] == changed

    def test_members_is_a_copy(self) -> None:
        """A caller cannot change the mirror."""
        node = self.node("a")
        node.members().clear()
        assert set(node.members()) == {"a"}

    def test_publish_needs_join(self) -> None:
        """A reader has no entries; withdrawing nothing is no error."""
        reader = self.reader()
        assert raises(LocalProtocolError, lambda: reader.publish(make_keys(1)))
        reader.withdraw(make_keys(1))

    def test_one_identity_per_directory(self) -> None:
        """A second node id is a bug of the caller."""
        node = self.node("a")
        assert raises(LocalProtocolError, lambda: node.join(make_member("b")))
        assert set(node.members()) == {"a"}

    def test_impossible_names_and_keys_are_refused(self) -> None:
        """At the call, not later in a thread."""
        reader = self.reader()
        for name in ("", "a/b", "a b", "ä", "x" * 1000):
            assert raises(LocalProtocolError, lambda name=name: reader.join(make_member(name)))  # type: ignore[misc]
        reader.join(make_member("a"))
        for key in (b"", b"short", b"x" * 1000):
            assert raises(LocalProtocolError, lambda key=key: reader.publish([BlockKey(key)]))  # type: ignore[misc]

    def test_a_newcomer_sees_what_was_there(self) -> None:
        """No event is needed."""
        writer = self.node("a")
        keys = make_keys(1_000)
        self.publish(writer, keys)
        newcomer = self.reader()
        assert newcomer.wait_revision(writer.revision(), self.reaction_s)
        assert newcomer.match(keys) == 1_000
        assert set(newcomer.members()) == {"a"}

    def test_close_removes_our_entries_at_once(self) -> None:
        """Sooner than the TTL; those of others stay."""
        leaver, stayer = self.node("a"), self.node("b")
        keys = make_keys(600)
        self.publish(leaver, keys)
        self.publish(stayer, keys[:10])
        leaver.close()
        assert wait_until(lambda: "a" not in stayer.members(), self.ttl_s / 2)
        assert stayer.locate(keys[:10]) == [("b",)] * 10
        assert wait_until(lambda: stayer.locate(keys[10:]) == [()] * 590, self.ttl_s / 2)

    def test_a_dead_member_vanishes_within_its_ttl(self) -> None:
        """Entries and membership go together; those of others stay."""
        dying, stayer = self.node("a"), self.node("b")
        keys = make_keys(600)
        self.publish(dying, keys)
        self.publish(stayer, keys[:10])
        self.sync(dying, stayer)
        self.kill(dying)
        assert wait_until(lambda: "a" not in stayer.members(), 2 * self.ttl_s + self.reaction_s)
        assert wait_until(lambda: stayer.locate(keys[10:]) == [()] * 590, self.reaction_s)
        assert stayer.locate(keys[:10]) == [("b",)] * 10

    def test_whoever_is_located_is_a_member(self) -> None:
        """So a reader can always look up the address."""
        nodes = [self.node(f"n{index}") for index in range(8)]
        keys = make_keys(200)
        for index, node in enumerate(nodes):
            self.publish(node, keys[index * 20 : index * 20 + 60], nodes[0])
        members = nodes[0].members()
        located = {holder for holders in nodes[0].locate(keys) for holder in holders}
        assert located == set(members) == {f"n{index}" for index in range(8)}

    def test_cells_do_not_see_each_other(self) -> None:
        """Not even with one name the beginning of the other."""
        inside, outside = self.node("a", self.cell), self.node("b", self.cell + "-2")
        keys = make_keys(4)
        self.publish(inside, keys)
        assert not wait_until(lambda: outside.match(keys) > 0, 0.3)
        assert set(outside.members()) == {"b"}

    # ------------------------------------------------------------------ order and time

    def test_wait_revision(self) -> None:
        """The past is there at once, the future takes until the timeout."""
        writer, reader = self.node("a"), self.reader()
        self.publish(writer, make_keys(1), reader)
        revision = reader.revision()
        assert reader.wait_revision(revision, 0.0)
        begin = time.monotonic()
        assert not reader.wait_revision(revision + 1_000_000, 0.2)
        assert 0.2 <= time.monotonic() - begin < 2.0
        self.publish(writer, make_keys(1, "next"), reader)
        assert reader.revision() > revision

    def test_concurrent_publishers(self) -> None:
        """Four threads on two members while a third reads: nothing is lost, nothing raises."""
        nodes = [self.node("a"), self.node("b")]
        reader = self.reader()
        keys = make_keys(4_000)
        errors: list[BaseException] = []
        is_done = threading.Event()

        def write(node: Directory, mine: Sequence[BlockKey]) -> None:
            try:
                for start in range(0, len(mine), 50):
                    node.publish(mine[start : start + 50])
                    node.withdraw(mine[start : start + 10])
            except BaseException as error:  # noqa: BLE001 - handed to the test's thread
                errors.append(error)

        def read() -> None:
            try:
                while not is_done.is_set():
                    reader.match(keys)
                    reader.locate(keys[:100])
                    reader.members()
                    reader.health()
            except BaseException as error:  # noqa: BLE001 - handed to the test's thread
                errors.append(error)

        writers = [
            threading.Thread(target=write, args=(nodes[index // 2], keys[index * 1_000 : index * 1_000 + 1_000]))
            for index in range(4)
        ]
        observer = threading.Thread(target=read)
        observer.start()
        for thread in writers:
            thread.start()
        for thread in writers:
            thread.join(30.0)
        for node in nodes:
            self.sync(node, reader)
        is_done.set()
        observer.join(30.0)
        assert errors == []
        expected: list[tuple[str, ...]] = []
        for index in range(4_000):
            expected.append(() if index % 50 < 10 else ("a" if index < 2_000 else "b",))
        assert reader.locate(keys) == expected

    # ------------------------------------------------------------------ life

    def test_health_and_metrics(self) -> None:
        """They tell what is there."""
        metrics = Metrics()
        reader = self.reader(metrics=metrics)
        writer = self.node("a")
        self.publish(writer, make_keys(300), reader)
        health = reader.health()
        assert (health.connected, health.num_blocks, health.num_members, health.error) == (True, 300, 1, "")
        assert writer.health().num_pending == 0
        assert health.revision == reader.revision()
        assert metrics.snapshot()["mooncake_directory_connected"] == 1

    def test_close_is_final_idempotent_and_fast(self) -> None:
        """Nothing raises afterwards, the last view stays readable."""
        node = self.node("a")
        keys = make_keys(3)
        self.publish(node, keys)
        begin = time.monotonic()
        node.close()
        node.close()
        assert time.monotonic() - begin < 2.5
        node.publish(make_keys(1, "late"))
        node.withdraw(keys)
        node.locate(keys)
        node.match(keys)
        assert not node.health().connected
        assert not node.wait_revision(node.revision() + 1, 0.05)
