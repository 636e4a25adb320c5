"""Outages: logged once, counted right, retried with patience."""

import logging

import pytest

from mooncake_store.directory.endpoints import Endpoint
from mooncake_store.directory.etcd_link import BACKOFF_MAX_S, Connector, LinkStatus
from mooncake_store.metrics import Metrics

ENDPOINTS = (Endpoint("127.0.0.1", 1), Endpoint("127.0.0.1", 2))


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def status(metrics):
    return LinkStatus(ENDPOINTS, metrics)


def gauge(metrics):
    return metrics.snapshot()["mooncake_directory_connected"]


def test_it_is_up_when_every_role_is(status, metrics):
    assert not status.is_up and gauge(metrics) == 0
    status.up("mirror")
    assert status.is_up and gauge(metrics) == 1
    status.down("session", "lost")
    status.down("mirror", "lost too")
    status.up("session")
    assert not status.is_up and gauge(metrics) == 0 and status.error == "mirror: lost too"
    status.up("mirror")
    assert status.is_up and gauge(metrics) == 1 and status.error == ""


def test_one_line_per_outage(status, caplog):
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            status.down("mirror", "refused")
            status.down("session", "refused")
        status.up("mirror")
        status.up("session")
        status.down("mirror", "reset")
        status.down("mirror", "refused")
        status.up("mirror")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert "start one with `mooncake etcd`" in lines[0] and "127.0.0.1:1,127.0.0.1:2" in lines[0]
    assert "is back" in lines[1] and "is back" in lines[3]
    assert lines[2].startswith("lost etcd") and "reset" in lines[2]


def test_servers_take_turns_and_pauses_grow(monkeypatch):
    opened = []

    class Rpc:
        def __init__(self, endpoint):
            opened.append(endpoint)

        def close(self):
            pass

    monkeypatch.setattr("mooncake_store.directory.etcd_link.EtcdRpc", Rpc)
    connector = Connector(ENDPOINTS)
    pauses = []
    for _ in range(20):
        assert connector.rpc() is connector.rpc()
        pauses.append(connector.failed())
    assert opened == list(ENDPOINTS) * 10
    assert pauses[0] <= 0.1 and pauses[1] <= 0.1
    assert min(pauses[10:]) >= BACKOFF_MAX_S / 2 and max(pauses) <= BACKOFF_MAX_S
    connector.succeeded()
    assert connector.failed() <= 0.1
