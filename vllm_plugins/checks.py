"""What eviction does not support is refused before an engine starts, in one sentence."""

from __future__ import annotations

from typing import Any

from .config import EvictionConfig, EvictionConfigError
from .registration import CONNECTOR


def is_configured(vllm_config: Any) -> bool:
    """Whether ``vllm_config`` (``vllm.config.VllmConfig`` or None) asks for eviction."""
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    return transfer is not None and transfer.kv_connector == CONNECTOR


def check_engine(vllm_config: Any) -> None:
    """Refuse an engine configuration under which eviction would be wrong.

    ``EngineArgs(...).create_engine_config()`` gives a ``VllmConfig`` without starting anything;
    the scheduler's connector calls this again, whoever built the configuration.

    Raises:
        EvictionConfigError: the first obstacle, and what to change.

    """
    from vllm.platforms import current_platform

    from .attention import check_settings

    config = EvictionConfig.parse(vllm_config.kv_transfer_config.kv_connector_extra_config)
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel = vllm_config.parallel_config
    refusals = [
        (
            cache.enable_prefix_caching,
            "prefix caching is on, and would share blocks computed after an eviction; "
            "set enable_prefix_caching=False (--no-enable-prefix-caching)",
        ),
        (
            vllm_config.speculative_config is not None,
            "speculative decoding is on, and its draft tokens would be scored; "
            "remove the speculative configuration",
        ),
        (
            model.use_mla,
            f"{model.model} uses multi-head latent attention (MLA); "
            "use a model with plain multi-head or grouped-query attention",
        ),
        (
            model.is_hybrid or model.is_attention_free,
            f"{model.model} has layers without attention; use an attention-only model",
        ),
        (
            model.is_encoder_decoder or model.runner_type != "generate",
            f"{model.model} is not a decoder that generates; use a decoder-only model",
        ),
        (
            bool(sliding_window(model)),
            f"{model.model} has sliding-window layers, which free blocks by a rule of their own; "
            "use a model with full attention in every layer",
        ),
        (
            cache.cache_dtype.startswith("fp8"),
            f"kv_cache_dtype is {cache.cache_dtype}, which is not tested; "
            'use kv_cache_dtype="auto"',
        ),
        (
            parallel.pipeline_parallel_size > 1,
            "pipeline parallelism splits the layers over processes; set pipeline_parallel_size=1",
        ),
        (
            getattr(parallel, "decode_context_parallel_size", 1) > 1,
            "decode context parallelism shards a block's tokens; "
            "set decode_context_parallel_size=1",
        ),
        (
            model.max_model_len is not None
            and cache.block_size is not None
            and cache.block_size > model.max_model_len,
            f"block_size is {cache.block_size}, longer than max_model_len {model.max_model_len}; "
            "use a smaller block",
        ),
    ]
    for refused, reason in refusals:
        if refused:
            raise EvictionConfigError(reason)
    if cache.block_size is not None:
        check_block_size(cache.block_size)
        config.check_budget(cache.block_size)
    check_settings(config.request_settings(None, cache.block_size or 1))
    if current_platform.is_cuda():
        _check_cuda(vllm_config)
    num_layers = model.get_num_layers(parallel)
    if num_layers % config.layer_groups:
        from .spec import check_layer_groups

        check_layer_groups(num_layers, config.layer_groups)


def sliding_window(model_config: Any) -> int | None:
    """The window of a model's windowed layers, None where every layer attends to all tokens."""
    if getattr(model_config.hf_text_config, "attention_chunk_size", None):
        return model_config.hf_text_config.attention_chunk_size
    return model_config.get_sliding_window()


def check_block_size(block_size: int) -> None:
    """Refuse a block size that the platform's kernels cannot read."""
    from .attention import platform

    here = platform()
    if not isinstance(block_size, int) or block_size < 1 or not here.reads_block_size(block_size):
        raise EvictionConfigError(
            f"block_size is {block_size!r}; this platform's kernels read blocks of "
            f"{here.block_sizes} tokens, so use 32 or 64"
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
    if vllm_config.parallel_config.use_ubatching:
        raise EvictionConfigError("dual batch overlap splits a step's rows; set enable_dbo=False")
