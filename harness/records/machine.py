"""The machine a run was on: hardware, and the memory that process and device held."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path
from typing import Any


def hardware(device: str) -> dict[str, Any]:
    """CPU, memory and, on CUDA, the GPU with its driver.

    Args:
        device: ``cpu`` or ``cuda``.

    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found: dict[str, Any] = {
        "device": device,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
    }
    if device == "cuda":
        found.update(_gpu())
    return found


def process_peak_memory_mib() -> float:
    """Peak resident memory of this process so far, MiB (weights, pool and scratch)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def device_memory_mib(device: str) -> float | None:
    """GPU memory in use now by NVML, MiB: all of the card. None without a GPU.

    vLLM reserves pool and scratch when it starts and gives nothing back while it runs, so what
    is in use at the end of a run is its peak.
    """
    if device != "cuda":
        return None
    nvml, handle = _nvml()
    return nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**20


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu() -> dict[str, Any]:
    import torch

    nvml, handle = _nvml()
    return {
        "gpu": nvml.nvmlDeviceGetName(handle),
        "gpu_memory_gib": round(nvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1),
        "driver": nvml.nvmlSystemGetDriverVersion(),
        "cuda": torch.version.cuda,
    }


def _nvml() -> tuple[Any, Any]:
    """NVML, and the handle of the GPU that this process uses first."""
    import torch
    from vllm.third_party import pynvml as nvml

    nvml.nvmlInit()
    # NVML counts all cards, CUDA those that CUDA_VISIBLE_DEVICES leaves; the UUID is the same.
    uuid = torch.cuda.get_device_properties(0).uuid
    return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
