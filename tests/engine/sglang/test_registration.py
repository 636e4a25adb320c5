"""What `pip install` alone does to an SGLang: its own interpreter is asked."""

import subprocess

from engine.sglang.servers import sglang_python

NAME = "mooncake_pull"


def inside(code, **changes):
    prelude = "from sglang.srt.plugins import load_plugins\n"
    return subprocess.run([sglang_python(), "-c", changes.get("before", "") + prelude + code], capture_output=True,
                          text=True, timeout=300, cwd="/")


def test_the_backend_is_known_to_every_part_of_sglang_and_registering_twice_changes_nothing():
    found = inside(f"""
load_plugins()
from mooncake_connector.engines.sglang.plugin import register
register()
from sglang.srt.arg_groups.choices import DISAGG_TRANSFER_BACKEND_CHOICES as choices
from sglang.srt.disaggregation.base import conn as base
from sglang.srt.disaggregation import utils
assert choices.count({NAME!r}) == 1, choices
backend = utils.TransferBackend({NAME!r})
roles = {{role.value: utils.get_kv_class(backend, role) for role in utils.KVClassType}}
assert roles["kvargs"] is base.KVArgs
for role, parent in (("manager", "BaseKVManager"), ("sender", "BaseKVSender"), ("receiver", "BaseKVReceiver"),
                     ("bootstrap_server", "BaseKVBootstrapServer")):
    assert issubclass(roles[role], getattr(base, parent)), role
    assert roles[role].__module__.startswith("mooncake_connector.engines.sglang"), role
    assert not roles[role].__abstractmethods__, role
fake = utils.get_kv_class(utils.TransferBackend.FAKE, utils.KVClassType.SENDER)
assert fake.__name__ == "FakeKVSender", "other backends go their usual way"
print("FINE")
""")
    assert "FINE" in found.stdout, found.stderr[-3000:]


def test_an_unused_plugin_loads_none_of_our_engine_code():
    found = inside("""
load_plugins()
import sys
loaded = [name for name in sys.modules if name.startswith(("mooncake_connector.transfer", "mooncake_store.client"))]
assert not loaded, loaded
print("FINE")
""")
    assert "FINE" in found.stdout, found.stderr[-3000:]


def test_an_older_release_is_refused_in_words_and_its_server_does_not_know_the_backend():
    found = inside(f"""
import importlib.metadata
importlib.metadata.version = lambda name: "0.5.22"
import logging
logging.basicConfig()
from mooncake_connector.engines.sglang.plugin import register
register()
from sglang.srt.arg_groups.choices import DISAGG_TRANSFER_BACKEND_CHOICES as choices
assert {NAME!r} not in choices
print("FINE")
""")
    assert "FINE" in found.stdout, found.stderr[-3000:]
    assert "SGLang 0.5.22 is older than 0.5.23" in found.stderr and "do: install sglang" in found.stderr
