"""Servers that anybody may send bytes to go on serving, whatever these are."""

from __future__ import annotations

import socket
import threading

import numpy as np
import pytest

from contract.store_parts import RawPeer, wait_for
from fuzz.decoders import DECODERS
from fuzz.mutations import mutants
from mooncake_store.client import StoreClient
from mooncake_store.config import StoreConfig
from mooncake_store.pull import wire
from mooncake_store.pull.control import query_status
from mooncake_store.testing.transport import Owned, Target, soon
from mooncake_store.transport.base import ShmOffer, TcpOffer
from mooncake_store.transport.shm import ShmTransport
from mooncake_store.transport.tcp import TcpTransport

NUM_INPUTS = 400


def inputs(*names: str) -> list[bytes]:
    chosen = [decoder for decoder in DECODERS if decoder.name in names]
    assert len(chosen) == len(names)
    return [data for decoder in chosen for data in mutants(decoder.samples, codec=decoder.codec, head=decoder.head,
                                                           count=NUM_INPUTS, seed=8)]


def connect(offer) -> socket.socket:
    if isinstance(offer, ShmOffer):
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        peer.connect(b"\0" + offer.socket.encode())
        return peer
    assert isinstance(offer, TcpOffer)
    return socket.create_connection((offer.host, offer.port))


@pytest.mark.parametrize(("make", "names"), [(TcpTransport, ("tcp-request", "tcp-reads")),
                                             (ShmTransport, ("shm-request",))])
def test_a_medium_that_is_sent_garbage_goes_on_serving(make, names):
    owner, reader = make(), make()
    owned = Owned(owner, "memfd", 1 << 20)
    threads = threading.active_count()
    for data in inputs(*names):
        with connect(owned.descriptor.offers[0]) as peer:
            try:
                peer.sendall(data)
            except OSError:
                pass  # refused while it was being sent
    attachment = reader.attach(owned.descriptor, deadline_ns=soon())
    target = Target(np.array([4096, 100]), np.array([8192, 7]))
    target.check(attachment.read(target.batch, deadline_ns=soon()), owned.bytes)
    assert threading.active_count() == threads
    attachment.close()
    reader.close()
    owner.close()
    owned.close()


def test_a_pull_server_that_is_sent_garbage_answers_each_and_goes_on_serving():
    client = StoreClient(StoreConfig(directory="off", segment_bytes=1 << 20, media=("shm",)))
    sent = [data for data in inputs("pull", "handoff-to-prefill", "region") if len(data) < 4096]
    with RawPeer(client.address) as peer:
        for data in sent:
            peer.send_bytes(data)
            peer.send(wire.StatusRequest(77))
            while not isinstance(answer := peer.receive(), wire.StatusReply) or answer.request_id != 77:
                pass  # what the garbage was answered with
    for data in sent:
        with RawPeer(client.address) as peer:
            peer.socket.sendall(data)  # without a length: most are not told apart, and hung up on

    def num_rejected() -> float:
        return sum(value for name, value in client.status().items()
                   if name.startswith("mooncake_protocol_errors_total"))

    wait_for(lambda: num_rejected() > len(sent), 20, "a refusal of most")
    samples = query_status(client.address, 5.0).samples
    assert 'mooncake_protocol_errors_total{reason="internal"}' not in samples
    assert samples["mooncake_leases_active"] == 0
    client.close()

