"""The flag ``--output`` of a benchmark."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path

from ..errors import UsageError
from ..records.output import output_path


def output_file(name: str) -> Path:
    """A flag's value as a file that can be written, before anything is measured.

    Raises:
        ArgumentTypeError: it cannot; ``argparse`` ends with the sentence and status 2.

    """
    try:
        return output_path(Path(name))
    except UsageError as error:
        raise ArgumentTypeError(str(error)) from None
