"""Hold one connection to one peer: its channel, its session and its open region.

Threading model: a link is used by one thread at a time. It may move between threads, with a lock in between.
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Sequence
from typing import Protocol

from mooncake_store.errors import MooncakeError
from mooncake_store.pull.base import PeerAddress
from mooncake_store.pull.channel import Channel
from mooncake_store.pull.session import PeerSession
from mooncake_store.pull.wire import Denied, Fetch, Fetched, FetchedBlock, Message
from mooncake_store.transport.base import Attachment, RegionDescriptor
from mooncake_store.types import BlockKey

logger = logging.getLogger(__name__)

_FIRST_FETCH = 1 << 48  # the session numbers its own questions from 1


class Attacher(Protocol):
    """What opens a peer's region; ``transport.media.Media`` is one."""

    def attach(self, region: RegionDescriptor, *, deadline_ns: int) -> Attachment:
        """Return an attachment or raise MooncakeError."""
        ...


class PeerLink:
    """One connection.

    Raises:
        PeerUnreachable: the address cannot be used.
    """

    def __init__(self, peer: PeerAddress, session: PeerSession) -> None:
        self.peer = peer
        self.session = session
        self.attachment: Attachment | None = None
        self.channel = Channel.connect(peer.control)
        self._last_fetch = _FIRST_FETCH
        self._poller = select.poll()
        self._poller.register(self.channel.fd, select.POLLIN)

    def lost_reason(self) -> str:
        """Return why an idle link is broken; empty while it is not. What else has come in waits to be taken."""
        return self.exchange() if self._poller.poll(0) else ""

    def send(self, message: Message) -> None:
        """Send a message as far as the connection takes it now. Whether it is broken, ``exchange`` says."""
        try:
            self.channel.send(message)
        except OSError as error:
            logger.debug("nothing sent to %s: %s", self.peer.node_id, error)

    def exchange(self) -> str:
        """Send and take in what can be; return why the connection is broken, empty while it is not."""
        try:
            if self.channel.unsent:
                self.channel.flush()
            self.channel.receive()
        except ConnectionRefusedError:
            return "the connection was refused"
        except OSError as error:
            return f"the connection broke: {error}"
        return ""

    def fetch(self, keys: Sequence[BlockKey], *, until_ns: int) -> Sequence[FetchedBlock | None] | None:
        """Ask for small blocks and wait for the answer; None when there is none in time, or a refusal.

        An answer that comes later is ignored by the session, as every answer to a question it did not ask.

        Raises:
            OSError: the connection is broken.
            WireError: the peer sent what cannot be decoded.
        """
        self._last_fetch += 1
        request_id = self._last_fetch
        self.channel.send(Fetch(request_id, tuple(keys)))
        while (remaining_ns := until_ns - time.monotonic_ns()) > 0 and self._poller.poll(remaining_ns / 1e6):
            self.channel.receive()
            while (message := self.channel.take()) is not None:
                if isinstance(message, Fetched) and message.request_id == request_id:
                    return message.blocks
                if isinstance(message, Denied) and message.request_id == request_id:
                    return None
        return None

    def attach(self, media: Attacher, region: RegionDescriptor, *, deadline_ns: int) -> str:
        """Open the peer's region; return why not, empty when it is open."""
        try:
            self.attachment = media.attach(region, deadline_ns=deadline_ns)
        except MooncakeError as error:
            return f"cannot attach: {error.message}"
        return ""

    def close(self) -> None:
        """Close the connection and the region. Idempotent."""
        attachment, self.attachment = self.attachment, None
        if attachment is not None:
            attachment.close()
        self.channel.close()
