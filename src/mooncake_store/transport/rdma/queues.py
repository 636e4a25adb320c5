"""Post chains of reads on queue pairs through pyverbs, and collect their completions.

Two ways to post. The extended one (QPEx) fills the device's queue in place: some 10 times less Python per read. The
classic one builds an SGE and a SendWR object per read, for providers that lack the other.

Completions are polled from a plain CQ in both: pyverbs cannot arm an extended one, and a chain makes one completion
however many reads it has.
"""

from __future__ import annotations

import os
import threading
from typing import Any, NamedTuple

from mooncake_store.errors import TransferFailed
from mooncake_store.transport.rdma.backend import Completion, Queue, Reads, Route, Status
from mooncake_store.transport.rdma.chains import QUEUE_DEPTH
from mooncake_store.transport.rdma.gids import gid_text

RETRIES = 6
"""Not 7, which some devices take for "for ever"."""
TIMEOUT_EXPONENT = 14
"""A retry comes after 4.096 us * 2^14 = 67 ms; all of them take half a second, on some devices a few."""
POLL_MAX = 64
_CHANNEL_LOCK = threading.Lock()


class Pyverbs(NamedTuple):
    """What we use of pyverbs: its modules, its enumerations wherever they are, and its base error."""

    device: Any
    pd: Any
    cq: Any
    mr: Any
    qp: Any
    wr: Any
    addr: Any
    enums: Any
    error: type[Exception]
    status_names: dict[int, str]


class ClassicQueues:
    """Queue pairs on one port. Implements ``backend.QueueSet``.

    Raises:
        pyverbs.pyverbs_error.PyverbsError: the device refuses.
    """

    def __init__(self, api: Pyverbs, context: Any, domain: Any, port: int, packet_numbers: list[int], *,
                 is_reader: bool) -> None:
        self._api = api
        self._port = port
        self._depth = QUEUE_DEPTH if is_reader else 1
        self._channel: Any = None
        self.fd = -1
        if is_reader:
            self._channel, self.fd = _open_channel(api, context)
        self._pairs: list[Any] = []
        self._status = _statuses(api.enums)
        try:
            num_entries = (self._depth + 1) * len(packet_numbers)  # on an error every request completes
            self._completions = api.cq.CQ(context, num_entries, None, self._channel, 0)
            for _ in packet_numbers:
                self._pairs.append(self._make_pair(context, domain))
        except api.error:
            self.close()
            raise
        self.queues = tuple(Queue(pair.qp_num, number)
                            for pair, number in zip(self._pairs, packet_numbers, strict=True))

    def connect(self, route: Route, peers: tuple[Queue, ...], *, is_reader: bool) -> None:
        """Connect every queue pair.

        Raises:
            TransferFailed: the device refuses the route.
        """
        try:
            for pair, own, peer in zip(self._pairs, self.queues, peers, strict=True):
                self._connect_pair(pair, own, peer, route, is_reader)
        except self._api.error as error:
            raise TransferFailed(f"cannot connect a queue pair: {error}", where="rdma") from error

    def post(self, index: int, first_wr_id: int, reads: Reads) -> None:
        """Post a chain.

        Raises:
            TransferFailed: the device refuses it; some of it may be under way.
        """
        chain = self.build(first_wr_id, reads)
        try:
            self._pairs[index].post_send(chain[0])
        except self._api.error as error:
            raise TransferFailed(f"cannot post {len(chain)} reads: {error}", where="rdma") from error
        finally:
            for request in chain:
                request.close()  # the collector would not free its entries

    def build(self, first_wr_id: int, reads: Reads) -> list[Any]:
        """Make the request objects of a chain, each linked to the next."""
        enums, wr = self._api.enums, self._api.wr
        chain: list[Any] = []
        following = None
        flags = enums.IBV_SEND_SIGNALED
        for i in range(len(reads.lengths) - 1, -1, -1):
            entry = wr.SGE(reads.local[i], reads.lengths[i], reads.lkey)
            request = wr.SendWR(wr_id=first_wr_id + i, opcode=enums.IBV_WR_RDMA_READ, num_sge=1, sg=[entry],
                                send_flags=flags, next_wr=following)
            request.set_wr_rdma(reads.rkey, reads.remote[i])
            entry.close()
            chain.append(request)
            following, flags = request, 0
        chain.reverse()
        return chain

    def poll(self) -> list[Completion]:
        """Return what completed."""
        count, completed = self._completions.poll(POLL_MAX)
        return [self._completion(entry.wr_id, entry.status) for entry in completed] if count else []

    def arm(self) -> None:
        """Ask for an event."""
        self._completions.req_notify()

    def take_event(self) -> None:
        """Consume an event; blocks, with the GIL held, unless ``fd`` is readable."""
        self._channel.get_cq_event(self._completions)
        self._completions.ack_events(1)

    def fail(self) -> None:
        """Put every queue pair into its error state."""
        attributes = self._api.qp.QPAttr()
        attributes.qp_state = self._api.enums.IBV_QPS_ERR
        for pair in self._pairs:
            try:
                pair.modify(attributes, self._api.enums.IBV_QP_STATE)
            except self._api.error as error:
                raise TransferFailed(f"cannot stop a queue pair: {error}", where="rdma") from error

    def close(self) -> None:
        """Destroy the queue pairs, then what they use. Idempotent."""
        for pair in self._pairs:
            pair.close()
        self._pairs.clear()
        for part in (getattr(self, "_completions", None), self._channel):
            if part is not None:
                part.close()

    def _make_pair(self, context: Any, domain: Any) -> Any:
        qp, enums = self._api.qp, self._api.enums
        return qp.QP(domain, qp.QPInitAttr(qp_type=enums.IBV_QPT_RC, scq=self._completions, rcq=self._completions,
                                           cap=self._capacity(), sq_sig_all=0))

    def _capacity(self) -> Any:
        return self._api.qp.QPCap(max_send_wr=self._depth, max_recv_wr=1, max_send_sge=1, max_recv_sge=1,
                                  max_inline_data=0)

    def _connect_pair(self, pair: Any, own: Queue, peer: Queue, route: Route, is_reader: bool) -> None:
        api = self._api
        attributes = api.qp.QPAttr(port_num=self._port)
        attributes.qp_access_flags = 0 if is_reader else api.enums.IBV_ACCESS_REMOTE_READ
        pair.to_init(attributes)
        if route.is_global:
            header = api.addr.GlobalRoute(dgid=api.addr.GID(gid_text(route.peer_gid)), sgid_index=route.own_gid_index,
                                          hop_limit=64)
            attributes.ah_attr = api.addr.AHAttr(dlid=route.peer_lid, port_num=self._port, is_global=1, gr=header)
        else:
            attributes.ah_attr = api.addr.AHAttr(dlid=route.peer_lid, port_num=self._port, is_global=0)
        attributes.dest_qp_num, attributes.rq_psn = peer.number, peer.packet_number
        attributes.path_mtu = route.mtu
        attributes.max_dest_rd_atomic, attributes.min_rnr_timer = route.reads_max, 12
        pair.to_rtr(attributes)
        if not is_reader:
            return  # enough to answer
        attributes.sq_psn, attributes.max_rd_atomic = own.packet_number, route.reads_max
        attributes.timeout, attributes.retry_cnt, attributes.rnr_retry = TIMEOUT_EXPONENT, RETRIES, RETRIES
        pair.to_rts(attributes)

    def _completion(self, wr_id: int, status: int) -> Completion:
        return Completion(wr_id, self._status.get(status, Status.OTHER),
                          self._api.status_names.get(status, f"status {status}"))


class ExtendedQueues(ClassicQueues):
    """Queue pairs that are filled in place. Between ``wr_start`` and ``wr_complete`` nothing may raise: wr_abort."""

    def __init__(self, api: Pyverbs, context: Any, domain: Any, port: int, packet_numbers: list[int], *,
                 is_reader: bool) -> None:
        self._entry = api.wr.SGE(0, 0, 0)
        super().__init__(api, context, domain, port, packet_numbers, is_reader=is_reader)

    def post(self, index: int, first_wr_id: int, reads: Reads) -> None:
        """Post a chain.

        Raises:
            TransferFailed: the device refuses it; then none of it is under way.
        """
        pair = self._pairs[index]
        try:
            self.fill(index, first_wr_id, reads)
            pair.wr_complete()
        except self._api.error as error:
            raise TransferFailed(f"cannot post {len(reads.lengths)} reads: {error}", where="rdma") from error

    def fill(self, index: int, first_wr_id: int, reads: Reads) -> None:
        """Write a chain into the queue; ``wr_complete`` or ``wr_abort`` must follow, unless this raises."""
        pair, entry, rkey = self._pairs[index], self._entry, reads.rkey
        read, set_entry = pair.wr_rdma_read, pair.wr_set_sge
        wr_id, last = first_wr_id, first_wr_id + len(reads.lengths) - 1
        entry.lkey = reads.lkey
        pair.wr_start()
        try:
            pair.wr_flags = 0
            for remote, local, length in zip(reads.remote, reads.local, reads.lengths, strict=True):
                if wr_id == last:
                    pair.wr_flags = self._api.enums.IBV_SEND_SIGNALED
                pair.wr_id = wr_id
                read(rkey, remote)
                entry.addr = local
                entry.length = length
                set_entry(entry)
                wr_id += 1
        except BaseException:
            pair.wr_abort()
            raise

    def abort(self, index: int) -> None:
        """Take back what ``fill`` wrote."""
        self._pairs[index].wr_abort()

    def close(self) -> None:
        """Destroy the queue pairs, then what they use. Idempotent."""
        super().close()
        entry, self._entry = self._entry, None
        if entry is not None:
            entry.close()

    def _make_pair(self, context: Any, domain: Any) -> Any:
        qp, enums = self._api.qp, self._api.enums
        return qp.QPEx(context, qp.QPInitAttrEx(
            qp_type=enums.IBV_QPT_RC, scq=self._completions, rcq=self._completions, cap=self._capacity(), pd=domain,
            sq_sig_all=0, send_ops_flags=enums.IBV_QP_EX_WITH_RDMA_READ,
            comp_mask=enums.IBV_QP_INIT_ATTR_PD | enums.IBV_QP_INIT_ATTR_SEND_OPS_FLAGS))


def _statuses(enums: Any) -> dict[int, Status]:
    return {
        enums.IBV_WC_SUCCESS: Status.OK,
        enums.IBV_WC_WR_FLUSH_ERR: Status.FLUSHED,
        enums.IBV_WC_REM_ACCESS_ERR: Status.REMOTE_ACCESS,
        enums.IBV_WC_RETRY_EXC_ERR: Status.RETRIES,
        enums.IBV_WC_RNR_RETRY_EXC_ERR: Status.RETRIES,
        enums.IBV_WC_LOC_PROT_ERR: Status.LOCAL,
    }


def _open_channel(api: Pyverbs, context: Any) -> tuple[Any, int]:
    """Return a completion channel and its descriptor, which pyverbs tells only since release 57.

    Raises:
        TransferFailed: the descriptor cannot be found.
    """
    with _CHANNEL_LOCK:
        before = set() if hasattr(api.cq.CompChannel, "fd") else _event_descriptors()
        channel = api.cq.CompChannel(context)
        fd = getattr(channel, "fd", None)
        if fd is None:
            fd = next(iter(_event_descriptors() - before), -1)
    if fd < 0:
        channel.close()
        raise TransferFailed("cannot find the descriptor of a completion channel in /proc/self/fd", where="rdma")
    return channel, int(fd)


def _event_descriptors() -> set[int]:
    found: set[int] = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if "infinibandevent" in os.readlink(f"/proc/self/fd/{name}"):
                found.add(int(name))
        except OSError:
            continue  # closed meanwhile
    return found
