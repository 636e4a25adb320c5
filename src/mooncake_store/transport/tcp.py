"""Serve and read memory over tcp: any memory, any machine. The medium that works everywhere."""

from __future__ import annotations

import socket
import threading

from mooncake_store.errors import MooncakeError, TransferFailed
from mooncake_store.transport.base import LocalMemory, RegionDescriptor, TcpOffer
from mooncake_store.transport.memory import host_identity
from mooncake_store.transport.tcp_reader import TcpAttachment
from mooncake_store.transport.tcp_server import ReadServer
from mooncake_store.transport.tls import TlsContexts

FAR_STREAMS = 2
"""Connections to another machine, whose packets arrive on different cores. Within one machine a second connection makes
the scheduler put both ends onto one core: 64 MiB take 5.2 memcpys instead of 3.8."""

class TcpTransport:
    """Serves and reads memory over tcp. Implements ``base.Transport``.

    Args:
        host: address to bind and to announce.
        num_streams: connections of one attachment; 0 = as many as the way to the peer wants.
        checksum: verify the checksums of what arrives.
        tls: encrypts, and lets in only members of the cell; None = plain. Both ends must agree.

    Threads: one, started by the first ``serve``, answers all readers; reading uses the caller's thread.
    """

    medium = "tcp"

    def __init__(self, host: str = "127.0.0.1", *, num_streams: int = 0, checksum: bool = True,
                 tls: TlsContexts | None = None) -> None:
        self._host = host
        self._num_streams = num_streams
        self._checksum = checksum and tls is None
        self._tls = tls
        self._lock = threading.Lock()
        self._server: ReadServer | None = None
        self._is_closed = False

    def probe(self) -> str:
        """Return why this medium cannot work here, empty when it can: binds the address for a moment."""
        try:
            family, _, _, _, address = socket.getaddrinfo(self._host, 0, type=socket.SOCK_STREAM)[0]
            with socket.create_server(address, family=family) as listener:
                if listener.getsockname()[0] in ("0.0.0.0", "::"):
                    return f"{self._host} is no address a peer can connect to; set `host` to this machine's"
        except OSError as error:
            return f"cannot bind {self._host}: {error}"
        return ""

    def serve(self, region_id: int, memory: LocalMemory) -> TcpOffer | None:
        """Let peers read the memory through the read server.

        Raises:
            TransferFailed: the transport is closed.
            OSError: the address cannot be bound.
        """
        with self._lock:
            if self._is_closed:
                raise TransferFailed("transport is closed", where="tcp")
            if self._server is None:
                self._server = ReadServer(self._host, self._tls.accepting if self._tls else None)
            self._server.add(region_id, memory)
            return TcpOffer(self._host, self._server.port, self._tls is not None)

    def withdraw(self, region_id: int) -> None:
        """Stop serving; answers under way break off. Idempotent."""
        with self._lock:
            if self._server is not None:
                self._server.remove(region_id)

    def attach(self, region: RegionDescriptor, *, deadline_ns: int) -> TcpAttachment:
        """Connect, and ask whether the region is served.

        Raises:
            RegionGone: it is not.
            PeerUnreachable: nobody answers.
            TransferFailed: not offered, not our protocol, or only one end uses TLS.
        """
        offer = next((offer for offer in region.offers if isinstance(offer, TcpOffer)), None)
        if offer is None:
            raise TransferFailed("the region is not offered over tcp")
        if offer.is_tls != (self._tls is not None):
            one, other = ("the owner", "this process") if offer.is_tls else ("this process", "the owner")
            raise TransferFailed(f"{one} uses TLS and {other} does not", where=f"tcp {offer.host}:{offer.port}",
                                 hint="set tls_cert, tls_key and tls_ca on every member of the cell, or on none")
        is_near = region.host.boot_id == host_identity().boot_id
        num_streams = self._num_streams or (1 if is_near else FAR_STREAMS)
        attachment = TcpAttachment(region, offer, num_streams=num_streams, checksum=self._checksum,
                                   tls=self._tls.connecting if self._tls else None)
        try:
            attachment.greet(deadline_ns)
        except MooncakeError:
            attachment.close()
            raise
        return attachment

    def close(self) -> None:
        """Withdraw everything and end the thread. Idempotent."""
        with self._lock:
            self._is_closed = True
            server, self._server = self._server, None
        if server is not None:
            server.close()
