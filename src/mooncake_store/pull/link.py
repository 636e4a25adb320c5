"""Hold one connection to one peer: its channel, its session and its open region.

Threading model: a link is used by one thread at a time. It may move between threads, with a lock in between.
"""

from __future__ import annotations

import logging
import select
from typing import Protocol

from mooncake_store.errors import MooncakeError
from mooncake_store.pull.base import PeerAddress
from mooncake_store.pull.channel import Channel
from mooncake_store.pull.session import PeerSession
from mooncake_store.pull.wire import Message
from mooncake_store.transport.base import Attachment, RegionDescriptor

logger = logging.getLogger(__name__)


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
        self._idle = select.poll()
        self._idle.register(self.channel.fd, select.POLLIN)

    def lost_reason(self) -> str:
        """Return why an idle link is broken; empty while it is not. What else has come in waits to be taken."""
        return self.exchange() if self._idle.poll(0) else ""

    def send(self, message: Message) -> None:
        """Send a message as far as the connection takes it now. Whether it is broken, ``exchange`` says."""
        try:
            self.channel.send(message)
        except OSError as error:
            logger.debug("nothing sent to %s: %s", self.peer.node_id, error)

    def exchange(self) -> str:
        """Send and take in what can be; return why the connection is broken, empty while it is not."""
        try:
            if self.channel.is_blocked:
                self.channel.flush()
            self.channel.receive()
        except ConnectionRefusedError:
            return "the connection was refused"
        except OSError as error:
            return f"the connection broke: {error}"
        return ""

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
