"""What a running server says about itself, and the tokens its model reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import aiohttp

from ..corpora import describe
from ..errors import UsageError
from ..models import recorded_name, resolve_model
from ..tokens import load_tokenizer, tokenize

_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Target:
    """A server that answers. ``root``: folder or hub id of the model, as the server knows it."""

    base_url: str
    model: str
    root: str
    max_model_len: int | None
    version: str | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "base_url": self.base_url,
            "model": recorded_name(self.model),
            "max_model_len": self.max_model_len,
            "vllm_version": self.version,
        }


async def find_target(base_url: str, model: str | None) -> Target:
    """Ask ``/v1/models`` (and ``/version``, which other servers may lack).

    Raises:
        UsageError: nobody answers, or the server does not serve ``model``.

    """
    base_url = base_url.rstrip("/")
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session:
            async with session.get(f"{base_url}/v1/models") as response:
                response.raise_for_status()
                models = (await response.json())["data"]
            async with session.get(f"{base_url}/version") as response:
                version = (await response.json())["version"] if response.ok else None
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError) as error:
        reason = str(error) or type(error).__name__
        raise UsageError(
            f"no OpenAI server answers at {base_url} ({reason}); give its address as --base-url, "
            "like http://localhost:8000"
        ) from None
    names = [entry["id"] for entry in models]
    if not names or (model is not None and model not in names):
        raise UsageError(f"{base_url} does not serve {model}; it serves: {', '.join(names)}")
    entry = models[names.index(model) if model is not None else 0]
    return Target(
        base_url, entry["id"], entry.get("root") or entry["id"], entry.get("max_model_len"), version
    )


class Texts:
    """Tokens of datasets under one model's tokenizer; loaded when first asked for."""

    def __init__(self, tokenizer: str) -> None:
        self._name = tokenizer
        self._tokenizer: Any = None
        self._tokens: dict[str, list[int]] = {}

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            UsageError: it has none; random prompts do without, given ``--vocab-size``.

        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(resolve_model(self._name))
        return self._tokenizer

    @property
    def vocabulary_size(self) -> int:
        return len(self.tokenizer)

    def tokens_of(self, dataset: str) -> list[int]:
        """All tokens of a dataset, documents joined, as ``kv-eviction offline`` reads it."""
        if dataset not in self._tokens:
            text = describe(dataset, None, "concatenate")
            self._tokens[dataset] = tokenize(self.tokenizer, text)[0]
        return self._tokens[dataset]
