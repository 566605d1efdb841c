"""Installed but not configured, the plugin is inert."""

import subprocess
import sys

CODE = """
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_spec_registry import _REGISTRY_KVCACHESPEC_LIST
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
import sys

backend = AttentionBackendEnum.CPU_ATTN.get_path()
load_general_plugins()
from vllm_plugins import register
register()
register()
assert AttentionBackendEnum.CPU_ATTN.get_path() == backend, "backend replaced"
assert not _REGISTRY_KVCACHESPEC_LIST, "specs registered"
assert "KVEvictionConnector" in KVConnectorFactory._registry, "entry point not installed"
for module in ("connector", "manager", "spec", "worker", "attention.cpu"):
    assert f"vllm_plugins.{module}" not in sys.modules, module
"""


def test_registering_changes_nothing_by_itself():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_public_names():
    import vllm_plugins

    assert all(hasattr(vllm_plugins, name) for name in vllm_plugins.__all__)
