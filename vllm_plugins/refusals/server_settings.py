"""A server's settings as one word, for the only thing vLLM hands to every front end: a class name.

Requests are checked in the front end (``LLM``, the API server, ``run-batch``) by a logits
processor's ``validate_params``, which sees the request alone; what the server offers must be in the
class. vLLM resolves ``module:name`` with ``getattr`` in each process, so the name carries it
(``requests.py``). Neither vLLM nor torch is imported here.
"""

from __future__ import annotations

import base64
import json

from ..config import EvictionConfig


def encode(config: EvictionConfig, block_size: int) -> str:
    """Block size and the settings that differ from the defaults: letters, digits, - and _."""
    defaults = EvictionConfig().to_dict()
    settings = {k: v for k, v in config.to_dict().items() if v != defaults[k]}
    text = json.dumps([block_size, settings], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def decode(word: str) -> tuple[EvictionConfig, int]:
    """Settings and block size of ``encode``.

    Raises:
        ValueError: not such a word.

    """
    padded = word + "=" * (-len(word) % 4)
    match json.loads(base64.urlsafe_b64decode(padded)):
        case [int(block_size), dict(settings)]:
            return EvictionConfig.parse(settings), block_size
    raise ValueError(f"{word} holds no settings")
