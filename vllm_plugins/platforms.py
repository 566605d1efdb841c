"""What differs by platform, in one table. Neither vLLM nor torch is imported with it.

To add a platform: its attention backend and worker state (``attention/cpu.py`` and
``attention/state_cpu.py`` are the models), its worker class (``worker_cpu.py``), and an entry in
``_PLATFORMS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .parsing import EvictionConfigError
from .policies import GRAPH, NEEDS
from .request_settings import RequestSettings

FP8 = frozenset({"fp8", "fp8_e4m3"})
"""Two names of one type: what vLLM's FlashAttention takes on Hopper. It takes no e5m2."""


@dataclass(frozen=True)
class Platform:
    """What differs by device type (``vllm.platforms.current_platform.device_type``)."""

    worker: str
    validator: str
    """A logits processor of the runner's interface (``refusals/requests.py``)."""
    block_sizes: str
    """The block sizes its attention and scoring kernels read, in words."""
    reads_block_size: Callable[[int], bool]
    engine_args: Mapping[str, str]
    """Further keywords of ``EngineArgs``."""
    gathers: frozenset[str]
    """Which of ``policies.NEEDS`` it can fill."""
    kv_cache_dtypes: frozenset[str]
    """Which of vLLM's quantised caches its kernels read, by the names of ``kv_cache_dtype``."""


_PLATFORMS = {
    "cpu": Platform(
        worker="vllm_plugins.worker_cpu.EvictionCPUWorker",
        validator="vllm_plugins.refusals.requests:RequestValidator",
        block_sizes="a multiple of 32",
        reads_block_size=lambda size: size % 32 == 0,
        engine_args={},
        gathers=NEEDS,
        kv_cache_dtypes=frozenset(),
    ),
    "cuda": Platform(
        worker="vllm_plugins.worker_cuda.EvictionCUDAWorker",
        validator="vllm_plugins.refusals.requests:RequestValidatorV2",
        block_sizes="16, 32, 64 or 128",
        reads_block_size=lambda size: size in (16, 32, 64, 128),
        engine_args={"attention_backend": "CUSTOM"},
        gathers=NEEDS - {GRAPH},
        kv_cache_dtypes=FP8,
    ),
}


def platform() -> Platform:
    """This process's platform.

    Raises:
        EvictionConfigError: eviction does not run here.

    """
    from vllm.platforms import current_platform

    try:
        return _PLATFORMS[current_platform.device_type]
    except KeyError:
        raise EvictionConfigError(
            f"eviction does not run on {current_platform.device_type or 'this platform'} yet; "
            f"install the build of vLLM for: {', '.join(_PLATFORMS)}"
        ) from None


def check_settings(settings: RequestSettings) -> None:
    """Refuse settings that need what this platform does not gather."""
    missing = settings.needs - platform().gathers
    if missing:
        raise EvictionConfigError(
            f"policy {settings.policy} with {dict(settings.policy_args)} needs "
            f"{', '.join(sorted(missing))}, which is gathered on CPUs only; choose another policy "
            f"or, for cab, bridge_definition median"
        )
