"""The entry point ``vllm.general_plugins``: runs in every vLLM process, changes nothing by itself.

It makes one name known, the connector's, which an engine uses only if its
``kv_transfer_config`` asks for it. The KV-cache spec registers itself where it is imported
(``spec.py``), which only a configured engine does; the attention backend is overridden by our
worker class (``worker.py``).
"""

from __future__ import annotations

CONNECTOR = "KVEvictionConnector"


def register() -> None:
    """Register the connector; safe to call any number of times."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    try:
        KVConnectorFactory.register_connector(CONNECTOR, "vllm_plugins.connector", CONNECTOR)
    except ValueError:
        return  # already registered in this process
