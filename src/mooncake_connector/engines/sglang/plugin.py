"""Register the transfer backend with SGLang: the ``sglang.srt.plugins`` entry point.

SGLang calls this in every process before it reads its arguments, and swallows whatever is raised. So a release that we
cannot serve is named in an error line, and the backend stays unknown: SGLang then refuses its name and ends.
"""

from __future__ import annotations

import logging

from mooncake_store.errors import ConfigError

logger = logging.getLogger(__name__)

BACKEND_NAME = "mooncake_pull"


def register() -> None:
    """Make ``--disaggregation-transfer-backend mooncake_pull`` work. Idempotent, never raises."""
    from mooncake_connector.engines.sglang import compat

    try:
        compat.add_transfer_backend(BACKEND_NAME, _load_classes)
    except ConfigError as error:
        logger.error("transfer backend %s is not available: %s; do: %s", BACKEND_NAME, error.message, error.hint)
    except Exception:
        # The border to an engine of any version: it must start for users who never asked for us.
        logger.exception("transfer backend %s is not available with this SGLang", BACKEND_NAME)


def _load_classes() -> dict[str, type]:
    """Return our class for each role; imported only once the backend was chosen."""
    from mooncake_connector.engines.sglang.disagg import PullBootstrapServer, PullManager
    from mooncake_connector.engines.sglang.receiver import PullReceiver
    from mooncake_connector.engines.sglang.sender import PullSender

    return {"manager": PullManager, "sender": PullSender, "receiver": PullReceiver,
            "bootstrap_server": PullBootstrapServer}
