"""Engine configurations under which eviction would be wrong, refused before an engine starts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..config import EvictionConfig
from ..parsing import EvictionConfigError
from ..platforms import FP8, check_settings, platform
from ..registration import CONNECTOR

SENTENCES = {
    "speculative": "speculative decoding is on, and its draft tokens would be scored; "
    "remove the speculative configuration (--speculative-config)",
    "mla": "{model} uses multi-head latent attention (MLA); "
    "use a model with plain multi-head or grouped-query attention",
    "window": "every layer of {model} has a sliding window, so nothing is left to evict; "
    "set max_model_len to at most their window of {window:,} tokens (--max-model-len), or use a "
    "model with full attention in some layers",
    "chunked": "{model} has layers that attend within chunks of {chunk:,} tokens, for which vLLM "
    "switches its hybrid KV-cache manager off; use a model with full attention or sliding windows",
    "windows_pool": "{model} has sliding-window layers beside those that evict, which needs vLLM's "
    "hybrid KV-cache manager; drop disable_hybrid_kv_cache_manager "
    "(--disable-hybrid-kv-cache-manager)",
    "page_sizes": "the model's sliding-window layers take more bytes a token than those that "
    "evict, so vLLM enlarges or pads the latter's blocks; use a model whose layers have KV heads "
    "of the same number and size",
    "kv_cache_dtype": "kv_cache_dtype is {dtype}, which is not tested with eviction; "
    'use kv_cache_dtype="auto", the type of the model, or "fp8" on CUDA (--kv-cache-dtype)',
    "kv_cache_dtype_here": "kv_cache_dtype is {dtype}, which eviction reads on CUDA only; "
    'use kv_cache_dtype="auto", the type of the model (--kv-cache-dtype)',
    "kv_cache_dtype_of_float16": "the model runs in float16, but over an fp8 cache "
    'FlashAttention 3 answers in bfloat16 only; use dtype="bfloat16" (--dtype), or '
    'kv_cache_dtype="auto" (--kv-cache-dtype)',
    "kv_cache_dtype_skip_layers": "kv_cache_dtype_skip_layers leaves layers whose blocks have "
    "another size than the others'; drop it (--kv-cache-dtype-skip-layers)",
    "connector": "the engine's KV connector is {connector}, so nothing would be evicted; "
    "eviction needs that place for itself: drop kv_transfer_config, MultiConnector and "
    "kv_offloading_size (--kv-transfer-config, --kv-offloading-size)",
    "pipeline": "pipeline parallelism splits the layers over processes; "
    "set pipeline_parallel_size=1 (--pipeline-parallel-size)",
    "context_parallel": "context parallelism shards a block's tokens; set "
    "decode_context_parallel_size and prefill_context_parallel_size to 1",
    "ubatching": "dual batch overlap splits a step's rows; set enable_dbo=False (--no-enable-dbo)",
    "worker": "the engine runs without the eviction worker; "
    "pass worker_cls as eviction_engine_args gives it",
    "layer_groups_pool": "layer_groups is {groups}, which needs vLLM's hybrid KV-cache manager; "
    "drop disable_hybrid_kv_cache_manager (--disable-hybrid-kv-cache-manager) or layer_groups",
}
"""Said by ``check_engine`` of a configuration, and by ``kv-eviction serve`` of flags alone."""
PLAIN_CACHES = ("float16", "bfloat16")
"""vLLM's names of caches that are not quantised, beside ``auto``."""


def is_configured(vllm_config: Any) -> bool:
    """Whether ``vllm_config`` (``vllm.config.VllmConfig`` or None) asks for eviction."""
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    return transfer is not None and transfer.kv_connector == CONNECTOR


def check_engine(vllm_config: Any) -> None:
    """Refuse an engine configuration under which eviction would be wrong.

    ``EngineArgs(...).create_engine_config()`` gives a ``VllmConfig`` without starting anything;
    workers call this again before they load the model, whoever built the configuration.

    Raises:
        EvictionConfigError: the first obstacle, and what to change.

    """
    from vllm.platforms import current_platform

    if not is_configured(vllm_config):
        transfer = vllm_config.kv_transfer_config
        name = transfer.kv_connector if transfer is not None else "none"
        raise EvictionConfigError(SENTENCES["connector"].format(connector=name))
    config = EvictionConfig.parse(vllm_config.kv_transfer_config.kv_connector_extra_config)
    for refused, reason in (
        *_model_obstacles(vllm_config),
        *_engine_obstacles(vllm_config, config),
    ):
        if refused:
            raise EvictionConfigError(reason)
    cache = vllm_config.cache_config
    of_model = str(vllm_config.model_config.dtype).removeprefix("torch.")
    check_kv_cache_dtype(cache.cache_dtype, (of_model,))
    if cache.block_size is not None:
        check_block_size(cache.block_size)
        config.check_budget(cache.block_size)
    check_settings(config.request_settings(None, cache.block_size))
    if current_platform.is_cuda():
        _check_cuda(vllm_config)
    elif vllm_config.use_v2_model_runner:
        raise EvictionConfigError(
            "the engine uses vLLM's V2 model runner, which eviction knows on CUDA only; "
            "unset VLLM_USE_V2_MODEL_RUNNER"
        )
    model = vllm_config.model_config
    num_layers = model.get_num_layers(vllm_config.parallel_config)
    layers = num_evicting_layers(model.hf_text_config, num_layers, model.max_model_len)
    check_layer_groups(layers, config.layer_groups)


def _model_obstacles(vllm_config: Any) -> list[tuple[bool, str]]:
    model = vllm_config.model_config
    name, length = model.model, model.max_model_len or 0
    # vLLM's rule: set where no layer is without a window (``EngineArgs.create_engine_config``).
    every = vllm_config.cache_config.sliding_window
    window, chunk = model.get_sliding_window(), model.attention_chunk_size
    hybrid_pool = not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    return [
        (model.use_mla, SENTENCES["mla"].format(model=name)),
        (
            model.is_hybrid or model.is_attention_free,
            f"{name} has layers without attention; use an attention-only model",
        ),
        (
            model.is_encoder_decoder or model.runner_type != "generate",
            f"{name} is not a decoder that generates; use a decoder-only model",
        ),
        (bool(chunk), SENTENCES["chunked"].format(model=name, chunk=chunk or 0)),
        (
            every is not None and every < length,
            SENTENCES["window"].format(model=name, window=every or 0),
        ),
        (
            window is not None and window < length and not hybrid_pool,
            SENTENCES["windows_pool"].format(model=name),
        ),
    ]


def _engine_obstacles(vllm_config: Any, config: EvictionConfig) -> list[tuple[bool, str]]:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    return [
        (vllm_config.speculative_config is not None, SENTENCES["speculative"]),
        (
            cache.cache_dtype in platform().kv_cache_dtypes and str(model.dtype) == "torch.float16",
            SENTENCES["kv_cache_dtype_of_float16"],
        ),
        (
            cache.cache_dtype in FP8 and bool(cache.kv_cache_dtype_skip_layers),
            SENTENCES["kv_cache_dtype_skip_layers"],
        ),
        (parallel.pipeline_parallel_size > 1, SENTENCES["pipeline"]),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            SENTENCES["context_parallel"],
        ),
        (parallel.use_ubatching, SENTENCES["ubatching"]),
        (
            config.layer_groups > 1 and bool(scheduler.disable_hybrid_kv_cache_manager),
            SENTENCES["layer_groups_pool"].format(groups=config.layer_groups),
        ),
        (
            model.max_model_len is not None
            and cache.block_size is not None
            and cache.block_size > model.max_model_len,
            f"block_size is {cache.block_size}, longer than max_model_len {model.max_model_len}; "
            "use a smaller block",
        ),
    ]


def check_kv_cache_dtype(dtype: str, plain: Collection[str] = PLAIN_CACHES) -> None:
    """Refuse a type of keys and values that this platform's kernels do not read.

    Args:
        dtype: a ``kv_cache_dtype`` of vLLM.
        plain: those that are not quantised and may be the model's own.

    """
    if dtype == "auto" or dtype in plain or dtype in platform().kv_cache_dtypes:
        return
    name = "kv_cache_dtype_here" if dtype in FP8 else "kv_cache_dtype"
    raise EvictionConfigError(SENTENCES[name].format(dtype=dtype))


def num_evicting_layers(config: Any, num_layers: int, max_model_len: int | None) -> int:
    """Layers without a window that hides anything, as far as a model's configuration says.

    Args:
        config: its text part, as Transformers has it.
        num_layers: of the model, or of this rank.
        max_model_len: tokens.

    """
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if not types or window is None or window >= (max_model_len or 0):
        return num_layers
    return num_layers - sum(kind == "sliding_attention" for kind in types)


def check_block_size(block_size: int) -> None:
    """Refuse a block size that the platform's kernels cannot read."""
    current = platform()
    whole = isinstance(block_size, int) and block_size >= 1
    if not whole or not current.reads_block_size(block_size):
        raise EvictionConfigError(
            f"block_size is {block_size!r}; this platform's kernels read blocks of "
            f"{current.block_sizes} tokens, so use 32 or 64"
        )


def check_layer_groups(num_layers: int, layer_groups: int) -> None:
    """Refuse a number of groups that does not divide the layers that evict."""
    if num_layers % layer_groups:
        divisors = [g for g in range(1, num_layers + 1) if num_layers % g == 0]
        raise EvictionConfigError(
            f"layer_groups is {layer_groups}, which does not divide the model's {num_layers} "
            f"layers with full attention; use one of: {', '.join(map(str, divisors))}"
        )


def _check_cuda(vllm_config: Any) -> None:
    backend = vllm_config.attention_config.backend
    if backend is None or backend.name != "CUSTOM":
        raise EvictionConfigError(
            f"the attention backend is {backend.name if backend else 'automatic'}; "
            "pass attention_backend as eviction_engine_args gives it (CUSTOM)"
        )
    if not vllm_config.use_v2_model_runner:
        raise EvictionConfigError(
            "the engine uses vLLM's V1 model runner, which eviction does not know on CUDA; "
            "unset VLLM_USE_V2_MODEL_RUNNER and drop what makes vLLM fall back to V1"
        )
    mode = vllm_config.compilation_config.cudagraph_mode
    if mode is not None and mode.mixed_mode().name == "FULL":
        raise EvictionConfigError(
            f"cudagraph_mode {mode.name} captures prefills whole, whose rows are scored by what "
            "they hold; use FULL_AND_PIECEWISE, vLLM's default"
        )
