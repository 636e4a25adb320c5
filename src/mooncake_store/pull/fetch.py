"""Fetch small blocks: one question, one answer that has their bytes, no lease.

A shortcut in front of the road with leases (round.py), which carries any block. It knows only how to succeed: a block
that its owner has lost, wrong bytes, a slow owner, a broken connection are all left to that road to find out and to
act on. So it gives up early, and nothing that it does not return has been touched.

Threading model: any thread; it runs in the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence

from mooncake_store.metrics import Metrics
from mooncake_store.pull.base import GetOutcome, Pulled, Runs
from mooncake_store.pull.link import PeerLink
from mooncake_store.pull.peers import Peers
from mooncake_store.pull.wire import FETCH_MAX_BYTES, KEYS_MAX, FetchedBlock, WireError
from mooncake_store.transport.checksum import checksum_of_bytes
from mooncake_store.transport.tcp_stream import SPACE
from mooncake_store.types import BlockKey, HostIdentity, NodeId

WAIT_MAX_NS = 20_000_000
"""An owner that needs longer is asked for a lease, which has more patience."""
INLINE = "inline"
"""What is named as the medium of blocks that came with an answer."""


class Fetcher:
    """Fetches small blocks over links that others have opened.

    Args:
        own_host: where we are; owners on it are preferred.
        max_bytes: more are not fetched; 0 fetches nothing.
        is_verifying: compare checksums.
    """

    def __init__(self, peers: Peers, *, own_host: HostIdentity, max_bytes: int, is_verifying: bool,
                 metrics: Metrics) -> None:
        self._peers = peers
        self._own_host = own_host
        self._max_bytes = min(max_bytes, FETCH_MAX_BYTES)
        self._is_verifying = is_verifying
        self._metrics = metrics

    def fetch(self, keys: Sequence[BlockKey], targets: Sequence[Runs], holders: Sequence[Sequence[NodeId]], *,
              now_ns: int, deadline_ns: int) -> list[Pulled] | None:
        """Return every block, in order; None when they are not small or not to be had this way.

        ``holders`` says who may be asked for each; ``targets`` where each goes.
        """
        if not 0 < len(keys) <= KEYS_MAX or deadline_ns <= now_ns:
            return None
        num_bytes = sum([length for runs in targets for _, length in runs])
        if num_bytes > self._max_bytes:
            return None
        candidates = [node for node in holders[0] if all(node in others for others in holders[1:])]
        link = self._peers.take_idle(candidates, num_bytes, own_host=self._own_host, now_ns=now_ns)
        if link is None:
            return None
        blocks = self._ask(link, keys, num_bytes, now_ns + min(WAIT_MAX_NS, (deadline_ns - now_ns) // 2))
        if blocks is None or len(blocks) != len(keys):
            return None
        images = [block.data for block in blocks if block is not None and self._is_right(block)]
        if list(map(len, images)) != [sum([length for _, length in runs]) for runs in targets]:
            return None
        for image, runs in zip(images, targets, strict=True):
            start = 0
            for address, length in runs:
                SPACE[address:address + length] = image[start:start + length]
                start += length
        self._metrics.add("mooncake_pull_bytes_total", num_bytes, medium=INLINE)
        return [Pulled(GetOutcome("ok", INLINE, len(block.data), ""), block.checksum, link.peer.node_id)
                for block in blocks if block is not None]

    def _ask(self, link: PeerLink, keys: Sequence[BlockKey], num_bytes: int,
             until_ns: int) -> Sequence[FetchedBlock | None] | None:
        is_reusable = False
        try:
            blocks = link.fetch(keys, until_ns=until_ns)
            is_reusable = True
            return blocks
        except OSError:
            return None
        except WireError as error:
            self._metrics.add("mooncake_protocol_errors_total", reason=error.reason)
            return None
        finally:
            self._peers.end(link, num_bytes, is_reusable=is_reusable)

    def _is_right(self, block: FetchedBlock) -> bool:
        return not self._is_verifying or checksum_of_bytes(block.data) == block.checksum
