"""Count for the whole process: SGLang shows on /metrics what any part of it counts, once per name.

With ``--enable-metrics`` SGLang runs prometheus_client in its multiprocess mode, which keeps one value per process and
sample, whichever registry it is in: two registries with the same names would overwrite each other's values.
"""

from __future__ import annotations

import functools

from mooncake_connector.metrics import CONNECTOR_METRICS
from mooncake_store.metrics import STORE_METRICS, Metrics


@functools.cache
def process_metrics() -> Metrics:
    """Return the metrics that transfer backend, linker and storage of this process share."""
    return Metrics(STORE_METRICS, CONNECTOR_METRICS)
