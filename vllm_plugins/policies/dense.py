"""The baseline: nothing is evicted."""

from .base import Policy

POLICY = Policy(name="dense", select=None)
