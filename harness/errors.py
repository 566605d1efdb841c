"""Errors a user can mend: the command line prints one sentence and ends with status 2."""

from __future__ import annotations


class UsageError(ValueError):
    """Something the user gave is wrong; the message says what to change."""
