"""Both directories pass the same kit."""

import pytest

from mooncake_store.config import StoreConfig
from mooncake_store.directory.memory import MemoryDirectory, shared_cell
from mooncake_store.directory.open import open_directory
from mooncake_store.directory.server import EtcdServer
from mooncake_store.testing.directory import DirectoryTests


class TestMemoryDirectory(DirectoryTests):
    def open_directory(self, cell, metrics):
        return MemoryDirectory(shared_cell(cell), metrics=metrics)

    def kill(self, directory):
        # A member of a memory cell cannot die apart from its peers: they are one process.
        directory.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as running:
        yield running


@pytest.mark.etcd
class TestEtcdDirectory(DirectoryTests):
    @pytest.fixture(autouse=True)
    def _use_server(self, server):
        self.url = server.url

    def open_directory(self, cell, metrics):
        return open_directory(StoreConfig(directory=self.url, cell=cell, membership_ttl_s=self.ttl_s), metrics)

    def kill(self, directory):
        directory.abandon()
