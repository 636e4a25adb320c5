"""Register the connector with vLLM: the ``vllm.general_plugins`` entry point.

vLLM loads this in every process (arg_utils.py, engine/core.py, worker_base.py) and an exception raised here would end
the engine's start-up, also for users who never asked for us. So it never raises: it says in one line why it did
nothing.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

CONNECTOR_NAME = "MooncakeKVConnector"
CONNECTOR_MODULE = "mooncake_connector.engines.vllm.connector"


def register() -> None:
    """Make ``--kv-transfer-config '{"kv_connector": "MooncakeKVConnector", ...}'`` work. Idempotent, never raises."""
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        KVConnectorFactory.register_connector(CONNECTOR_NAME, CONNECTOR_MODULE, CONNECTOR_NAME)
    except ValueError:
        logger.debug("%s is registered already", CONNECTOR_NAME)
    except Exception as error:
        # The border to an engine of any version: whatever it raises must not end the engine's start-up.
        logger.warning("%s is not available with this vLLM: %s: %s", CONNECTOR_NAME, type(error).__name__, error,
                       exc_info=True)
