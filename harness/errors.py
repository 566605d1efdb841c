"""Errors a user can mend: the command line prints one sentence and ends with status 2."""

from __future__ import annotations


class UsageError(ValueError):
    """Something the user gave is wrong; the message says what to change."""


class UnreadableFile(UsageError):
    """A file that this program wrote is cut short, or holds what it never writes."""


class UnwritableFile(UsageError):
    """A file cannot be written: no space, no permission, no such place."""
