"""Numbers from the host to the device."""

from __future__ import annotations

from typing import Any

import torch


def upload(numbers: Any, device: torch.device) -> torch.Tensor:
    """``numbers``, lists of equal length, as int64 on ``device``; a GPU is not waited for."""
    made = torch.tensor(numbers, dtype=torch.int64)
    if device.type == "cuda":
        made = made.pin_memory().to(device, non_blocking=True)
    return made
