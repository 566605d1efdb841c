"""What a running server says about itself, and the tokens its model reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import aiohttp

from ..errors import UsageError
from ..inputs.corpora import describe
from ..inputs.models import recorded_name, resolve_model
from ..inputs.tokens import load_tokenizer, tokenize
from .answer import MALFORMED

_TIMEOUT_S = 30.0
_KEY = "OPENAI_API_KEY"


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


async def find_target(base_url: str, model: str | None, api_key: str | None = None) -> Target:
    """Ask ``/v1/models`` (and ``/version``, which other servers may lack).

    Args:
        base_url: of the server, without ``/v1``.
        model: one that it must serve; None: its first.
        api_key: bearer token.

    Raises:
        UsageError: nobody answers, the key is refused, the answer is no list of models, or the
            server does not serve ``model``.

    """
    base_url = base_url.rstrip("/")
    try:
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S), headers=authorization(api_key)
        ) as session:
            status, text = await _get(session, f"{base_url}/v1/models")
            version = await _version(session, base_url)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise _no_server(base_url, str(error) or type(error).__name__) from None
    if status in (401, 403):
        raise UsageError(
            f"{base_url} "
            + (f"refuses the API key in {_KEY}" if api_key else "asks for an API key")
            + f" (HTTP {status}); set {_KEY} to the key that the server was started with"
        )
    if status != 200:
        raise _no_server(base_url, f"HTTP {status} for {base_url}/v1/models")
    entries = _entries(base_url, text)
    names = [entry["id"] for entry in entries]
    if not names:
        raise UsageError(f"{base_url} serves no model: its /v1/models names none")
    if model is not None and model not in names:
        raise UsageError(f"{base_url} does not serve {model}; it serves: {', '.join(names)}")
    entry = entries[names.index(model) if model is not None else 0]
    root, length = entry.get("root"), entry.get("max_model_len")
    return Target(
        base_url,
        entry["id"],
        root if root and isinstance(root, str) else entry["id"],
        length if type(length) is int and length > 0 else None,
        version,
    )


def authorization(api_key: str | None) -> dict[str, str]:
    """The header that carries an API key; none without a key.

    Raises:
        UsageError: it holds what no header can.

    """
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()):
        raise UsageError(
            f"{_KEY} holds line ends or characters that no HTTP header can carry; set it to the "
            "key alone"
        )
    return {"Authorization": f"Bearer {api_key}"}


async def _get(session: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    async with session.get(url) as response:
        return response.status, await response.text(errors="replace")


async def _version(session: aiohttp.ClientSession, base_url: str) -> str | None:
    try:
        status, text = await _get(session, f"{base_url}/version")
        version = json.loads(text)["version"] if status == 200 else None
    except (aiohttp.ClientError, OSError, TimeoutError, *MALFORMED):
        return None
    return version if isinstance(version, str) else None


def _no_server(base_url: str, reason: str) -> UsageError:
    hint = "leave /v1 out of" if base_url.endswith("/v1") else "give its address as"
    return UsageError(
        f"no OpenAI server answers at {base_url} ({reason}); {hint} --base-url, "
        "like http://localhost:8000"
    )


def _entries(base_url: str, text: str) -> list[dict[str, Any]]:
    """Models with a name; a server may list others."""
    try:
        entries = list(json.loads(text)["data"])
    except MALFORMED:
        shown = " ".join(text.split())[:80]
        raise UsageError(
            f"{base_url}/v1/models is no list of models ({shown!r}); give the address of an "
            "OpenAI server as --base-url"
        ) from None
    return [e for e in entries if isinstance(e, dict) and e.get("id") and isinstance(e["id"], str)]


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
