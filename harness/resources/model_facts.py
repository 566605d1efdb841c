"""What a model's ``config.json`` alone tells about eviction, before anything is imported.

A first look, before vLLM's. The engine's own check
(``vllm_plugins.refusals.engine.check_engine``) knows what vLLM makes of the configuration.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vllm_plugins.parsing import EvictionConfigError
from vllm_plugins.refusals.engine import SENTENCES, check_layer_groups

from ..errors import UsageError
from ..inputs.models import DEFAULT_MODEL

_ALL_WINDOWED = ("mistral", "mixtral", "phi3", "starcoder2")
"""Types of models that have one window for all layers, if any."""


def read_config(model: str, *, fetch: bool = False) -> dict[str, Any] | None:
    """The text part of a model's configuration; None where it is not on this machine.

    Args:
        model: a folder, or a hub id.
        fetch: ask the hub for what is not in its cache.

    Raises:
        UsageError: the file is no JSON, or the hub has no such model.

    """
    path = Path(model) / "config.json"
    if not path.is_file():
        cached = None if os.environ.get("VLLM_USE_MODELSCOPE") else _of_hub(model, fetch)
        if cached is None:
            return None
        path = Path(cached)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def _of_hub(model: str, fetch: bool) -> str | None:
    """The configuration in the hub's cache; None: it is not there."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        cached = try_to_load_from_cache(model, "config.json")
        if isinstance(cached, str):
            return cached
        return hf_hub_download(model, "config.json") if fetch else None
    except LocalEntryNotFoundError:
        reason = "it is not in the cache, and the hub cannot be reached"
    except EntryNotFoundError:  # of another format, which vLLM may know
        return None
    except (OSError, ValueError) as error:  # unknown, gated or no hub id
        reason = str(error).strip().splitlines()[0]
    raise UsageError(
        f"{model} is no folder here and cannot be had from the hub ({reason}); give a model "
        f"folder, a hub id, or {DEFAULT_MODEL}"
    )


def check_config(
    model: str, config: dict[str, Any], layer_groups: int, max_model_len: int | None
) -> None:
    """Refuse a model whose blocks cannot be evicted.

    Args:
        model: its name, for the sentence.
        config: of ``read_config``.
        layer_groups: that the server was asked for.
        max_model_len: tokens, as given; None: the model's own.

    Raises:
        EvictionConfigError: what stands in the way.

    """
    if config.get("kv_lora_rank"):
        raise EvictionConfigError(SENTENCES["mla"].format(model=model))
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    length = max_model_len or config.get("max_position_embeddings")
    layers, types = config.get("num_hidden_layers"), config.get("layer_types")
    if isinstance(window, int) and isinstance(length, int) and 0 < window < length:
        if not types and config.get("model_type") not in _ALL_WINDOWED:
            return  # which layers have it, Transformers derives
        layers = sum(kind != "sliding_attention" for kind in types or ())
        if not layers:
            raise EvictionConfigError(SENTENCES["window"].format(model=model, window=window))
    if isinstance(layers, int):
        check_layer_groups(layers, layer_groups)
