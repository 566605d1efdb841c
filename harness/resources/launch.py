"""Starts vLLM engines under a specification, and ends them cleanly."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from math import ceil
from typing import Any

from vllm_plugins.attention.token_scores import bytes_per_token
from vllm_plugins.config import EvictionConfig
from vllm_plugins.policies import TOKEN_NEEDS

from ..errors import UsageError
from ..study.batch_specification import BatchEngineSpecification
from ..study.points import check_known
from ..study.specification import EngineSpecification
from .batch_engine import worker_arguments
from .batch_worker import engine_arguments
from .engine import Engine
from .kv_bytes import bytes_per_block, kv_itemsize


def device_type() -> str:
    """``cpu`` or ``cuda``, as vLLM sees it."""
    _quiet()
    from vllm.platforms import current_platform

    return current_platform.device_type


def preflight(specification: EngineSpecification) -> Any:
    """vLLM's configuration of an engine, checked, without starting anything.

    Raises:
        UsageError: vLLM refuses model or settings. ``EvictionConfigError``: eviction does.

    """
    _quiet()
    from vllm import EngineArgs

    from vllm_plugins import EvictionConfigError
    from vllm_plugins.refusals.engine import check_engine

    arguments = _arguments(specification)
    try:
        config = EngineArgs(**arguments).create_engine_config()
    except EvictionConfigError:
        raise
    except Exception as error:  # whatever Transformers and vLLM find wrong with a model
        refusal = UsageError(f"vLLM refuses {specification.model}: {_reason(error)}")
        config = _at_full_length(specification, arguments, refusal)
    check_engine(config)
    return config


def check_batch_engine(specification: BatchEngineSpecification, num_tokens: int) -> None:
    """Refuse what a batch engine could not be started with, without starting anything.

    Args:
        specification: of the engine.
        num_tokens: of the longest request.

    Raises:
        UsageError: vLLM refuses model or settings. ``EvictionConfigError``: eviction does.

    """
    _quiet()
    from vllm import EngineArgs

    from vllm_plugins import EvictionConfigError
    from vllm_plugins.refusals.engine import check_engine

    arguments = engine_arguments(**worker_arguments(specification))
    known = {f.name for f in fields(EngineArgs)}
    check_known(specification.arguments, known, "the engine of a bench study")
    try:
        config = EngineArgs(**arguments).create_engine_config()
    except EvictionConfigError:
        raise
    except Exception as error:  # whatever Transformers and vLLM find wrong with a model
        raise UsageError(f"vLLM refuses {specification.model}: {_reason(error)}") from None
    if num_tokens > (length := config.model_config.max_model_len):
        raise UsageError(
            f"a request of the load has {num_tokens} tokens at its end, more than the {length} "
            f"that {specification.model} takes here; lower it, or set engine.max_model_len"
        )
    if specification.eviction is not None:
        check_engine(config)


@contextmanager
def running(specification: EngineSpecification) -> Iterator[Engine]:
    """An engine for the duration of the block.

    The pool holds every window in flight without eviction, so that no method is preempted while
    it is scored and all are compared at the same concurrency.

    Raises:
        UsageError: vLLM refuses model or settings. ``EvictionConfigError``: eviction does.

    """
    config = preflight(specification)
    from vllm import LLM

    # The pool is given in bytes, so vLLM only asks whether so much of a GPU is free: let other
    # engines be on it.
    share = {"gpu_memory_utilization": 0.1} if config.device_config.device_type == "cuda" else {}
    llm = LLM(
        **_arguments(specification),
        **share,
        hf_overrides=config.model_config.hf_overrides,
        kv_cache_memory_bytes=_pool_bytes(config, specification),
    )
    try:
        yield Engine(llm, specification)
    finally:
        # Left to the interpreter's exit, vLLM's engine can abort there with status 134.
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        if config.device_config.device_type == "cuda":
            import torch

            torch.cuda.empty_cache()


def _quiet() -> None:
    # In one process all windows of a wave are in the queue before the first step, so they move
    # in lockstep at the given chunk; and there is one peak memory to report.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


def _at_full_length(
    specification: EngineSpecification, arguments: dict[str, Any], refusal: UsageError
) -> Any:
    """The configuration of an engine whose windows are as long as the model can read.

    vLLM wants room for one sampled token behind every prompt, so ``max_model_len`` is one above
    the model's maximum then, which vLLM refuses unless the configuration allows it by a
    ``model_max_length`` of its own. That token is never an input: no position beyond the model's
    is computed.

    Raises:
        UsageError: windows are longer than that, or vLLM refused for another reason: ``refusal``.

    """
    from vllm import EngineArgs

    try:
        longest = EngineArgs(**{**arguments, "max_model_len": None}).create_model_config()
    except Exception:
        raise refusal from None
    length, longest = specification.context_length, longest.max_model_len
    if length > longest:
        raise UsageError(
            f"--context-length {length} is more than {specification.model} can read; "
            f"give at most {longest}"
        ) from None
    if length < longest:
        raise refusal from None
    overrides = {"model_max_length": arguments["max_model_len"]}
    try:
        return EngineArgs(**arguments, hf_overrides=overrides).create_engine_config()
    except Exception as error:
        raise UsageError(f"vLLM refuses {specification.model}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What is wrong, without pydantic's count of errors, field names and link."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        found = [entry["msg"].removeprefix("Value error, ") for entry in errors()]
    else:
        found = [str(error) or type(error).__name__]
    return " ".join(" ".join(found).split())


def _arguments(specification: EngineSpecification) -> dict[str, Any]:
    from vllm_plugins import eviction_engine_args

    return {
        "model": specification.model_path,
        "dtype": specification.dtype,
        "kv_cache_dtype": specification.kv_cache_dtype,
        "max_model_len": specification.context_length + 1,
        "max_num_seqs": specification.max_num_seqs,
        "max_num_batched_tokens": specification.max_num_batched_tokens,
        "long_prefill_token_threshold": specification.prefill_chunk,
        "enforce_eager": specification.enforce_eager,
        "enable_trace_replay": specification.protocol == "decode",
        # With steps in flight a decision would come a chunk late, on some machines and not on
        # others; a token late does not matter.
        "async_scheduling": specification.protocol == "decode",
        "use_tqdm_on_load": False,
        "seed": 0,
        **eviction_engine_args(
            block_size=specification.block_size,
            prefix_caching=specification.prefix_caching,
            **specification.eviction,
        ),
    }


def _pool_bytes(config: Any, specification: EngineSpecification) -> int:
    groups = specification.eviction["layer_groups"]
    per_window = -(-config.model_config.max_model_len // specification.block_size) + 1
    blocks = (specification.kv_pool_windows * per_window + 1) * groups
    # The worker takes the scores of tokens off what vLLM may spend.
    needs = EvictionConfig.parse(specification.eviction).needs() & TOKEN_NEEDS
    per_head = 2 * config.model_config.get_head_size() * kv_itemsize(config)
    scored = bytes_per_token(needs) / per_head
    return ceil((blocks + 1) * (1 + scored) * bytes_per_block(config, specification))
