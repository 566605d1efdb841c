"""What spares unit tests time."""

import pytest


@pytest.fixture
def blank_figures(monkeypatch):
    """Figures are drawn but not rendered, which takes most of a report's time: empty files."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: path.write_bytes(b""))
