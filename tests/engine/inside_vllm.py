"""What we rely on inside vLLM, checked against the installed one without starting a server.

Run by test_inside_vllm.py in the engine's environment.
"""

import logging
import types

import pytest


def test_registering_twice_is_harmless_and_selects_our_class():
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from mooncake_connector.engines.vllm.connector import MooncakeKVConnector
    from mooncake_connector.engines.vllm.plugin import register

    register()
    register()
    config = KVTransferConfig(kv_connector="MooncakeKVConnector", kv_role="kv_both")
    assert KVConnectorFactory.get_connector_class(config) is MooncakeKVConnector
    assert KVConnectorFactory.supports_hma_config(config)


def test_a_broken_engine_does_not_end_its_start_up(monkeypatch, caplog):
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from mooncake_connector.engines.vllm.plugin import register

    def explode(*args):
        raise AttributeError("moved")

    monkeypatch.setattr(KVConnectorFactory, "register_connector", explode)
    with caplog.at_level(logging.WARNING):
        register()
    assert "not available with this vLLM: AttributeError: moved" in caplog.text


def test_every_hook_of_the_base_class_that_vllm_calls_is_ours_or_has_a_default():
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    from mooncake_connector.engines.vllm import compat
    from mooncake_connector.engines.vllm.connector import MooncakeKVConnector

    compat.require_supported()
    assert not getattr(MooncakeKVConnector, "__abstractmethods__", None)
    ours = {name for name in vars(MooncakeKVConnector) if not name.startswith("_")}
    unknown = ours - set(dir(KVConnectorBase_V1)) - {"scheduler", "worker", "request_finished_all_groups"}
    assert not unknown, f"vLLM no longer calls {unknown}"


@pytest.mark.parametrize("is_active", [True, False])
def test_a_calm_reader_sleeps_on_the_notification_and_wakes_by_it(is_active):
    import time

    import zmq
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
    from vllm.utils.network_utils import get_open_zmq_ipc_path

    from mooncake_connector.engines.vllm.compat import CALM_POLL_MS, Calm

    Calm.install()
    Calm.install()
    address = get_open_zmq_ipc_path()
    context = zmq.Context()
    writer = SpinCondition(is_reader=False, context=context, notify_address=address)
    reader = SpinCondition(is_reader=True, context=context, notify_address=address)
    Calm.active = is_active
    try:
        time.sleep(0.1)
        reader.record_read()
        started = time.monotonic()
        reader.wait()
        waited_s = time.monotonic() - started
        assert (waited_s > CALM_POLL_MS / 1000 * 0.8) == is_active
        if is_active:
            writer.notify()
            started = time.monotonic()
            reader.wait()
            assert time.monotonic() - started < CALM_POLL_MS / 1000 / 2
    finally:
        Calm.active = False
        for condition in (writer, reader):
            for socket in (condition.local_notify_socket, condition.read_cancel_socket,
                           getattr(condition, "write_cancel_socket", None)):
                if socket is not None:
                    socket.close(0)
        context.term()


def test_statistics_travel_as_deltas_and_reach_the_metrics_page():
    import prometheus_client

    from mooncake_connector.engines.vllm.connector import MooncakeKVConnector
    from mooncake_connector.engines.vllm.stats import StatsSource

    source = StatsSource("0")
    samples = {'mooncake_save_blocks_total{result="stored"}': 3.0, "mooncake_blocks_held": 7.0,
               "mooncake_handoff_seconds_sum": 1.0}
    first = source.take(samples)
    assert first.data["counters"] == {'mooncake_save_blocks_total{result="stored"}': 3.0}
    assert source.take(samples) is None
    second = source.take({**samples, 'mooncake_save_blocks_total{result="stored"}': 5.0, "mooncake_blocks_held": 0.0})
    rebuilt = MooncakeKVConnector.build_kv_connector_stats(first.to_dict()).aggregate(second)
    assert rebuilt.data["counters"] == {'mooncake_save_blocks_total{result="stored"}': 5.0}
    assert rebuilt.data["gauges"] == {"0": {"mooncake_blocks_held": 0.0}}
    assert rebuilt.reduce()["pool_saved_blocks"] == 5.0

    registry = prometheus_client.CollectorRegistry()

    def bound(cls):
        return lambda **kwargs: cls(registry=registry, **{k: v for k, v in kwargs.items() if k != "multiprocess_mode"})

    types_ = {prometheus_client.Counter: bound(prometheus_client.Counter),
              prometheus_client.Gauge: bound(prometheus_client.Gauge),
              prometheus_client.Histogram: bound(prometheus_client.Histogram)}
    page = MooncakeKVConnector.build_prom_metrics(types.SimpleNamespace(kv_transfer_config=None), types_, ["engine"],
                                                  {0: ["0"]})
    page.observe(rebuilt.to_dict())
    page.observe({"counters": {}, "gauges": {"1": {"mooncake_blocks_held": 2.0}}})
    assert registry.get_sample_value("mooncake_save_blocks_total", {"engine": "0", "result": "stored"}) == 5.0
    assert registry.get_sample_value("mooncake_blocks_held", {"engine": "0"}) == 2.0


def test_weights_are_named_by_content_not_by_path(tmp_path):
    from mooncake_connector.transfer.model import config_digest, weights_digest

    for name, data in (("a", b"x" * 9000), ("b", b"x" * 9000), ("c", b"x" * 8999 + b"y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(data)
    digests = [weights_digest(str(tmp_path / name), "None") for name in "abc"]
    assert digests[0] == digests[1] != digests[2]
    assert weights_digest("org/model", "main") == "org/model@main"
    assert config_digest({"a": 1, 2: {0: "x"}, "_name_or_path": "p"}) == config_digest({2: {0: "x"}, "a": 1})
    assert config_digest({"a": 1}) != config_digest({"a": 2})
