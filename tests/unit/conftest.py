"""What spares unit tests time."""

import pytest
from transformers import LlamaConfig

from ..engine.conftest import TINY
from .made_up_engine import made_up_engines


@pytest.fixture
def blank_figures(monkeypatch):
    """Figures are drawn but not rendered, which takes most of a report's time: empty files."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: path.write_bytes(b""))


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory):
    """Folder of a model's configuration. There are no weights: nothing is computed."""
    folder = tmp_path_factory.mktemp("tiny-config")
    LlamaConfig(**TINY, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def engines(smollm2):
    """Made-up engines in place of vLLM's, and how many were started."""
    with made_up_engines() as made:
        yield made
