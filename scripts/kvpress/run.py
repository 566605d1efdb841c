"""Scores exported windows under NVIDIA's kvpress. Runs in an environment of its own.

    .venv-kvpress/bin/python scripts/kvpress/run.py --windows FILE --model FOLDER --output FOLDER

A window's prompt, all tokens before the one at ``min_context - 1``, is prefilled under a press,
which then compresses the cache once. The other tokens follow in one forward pass, each at its own
position. Their log-likelihoods are kept as sums over 64 queries, in the form of this project's own
records (harness/analysis/perplexity.py). Imports nothing of ``harness`` and needs no network.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from files import Refused, read_json, read_windows, write_json
from presses import NEEDS_ATTENTION, PRESSES, press_of
from source import provenance, timestamp
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

SCHEMA_VERSION = 1
CHUNK = 64
"""Queries per sum."""
DENSE = "dense"
_SOURCE = ("versions", "hardware", "code")
"""What a record must agree in to be kept."""


@torch.inference_mode()
def log_likelihoods(model: Any, tokens: list[int], prompt: int, press: Any) -> tuple[Any, int]:
    """Log-likelihoods of a window's tokens behind the prompt, and what was kept of the prompt.

    Args:
        model: of Transformers.
        tokens: the window, ``[n]``.
        prompt: tokens that are prefilled under ``press``.
        press: None for the whole cache.

    Returns:
        float64 ``[n - prompt - 1]``: entry ``i`` is of the token at ``prompt + i + 1``, given by
        the query at ``prompt + i``; and the number of tokens each head has kept.

    Raises:
        Refused: layers have kept different numbers of tokens.

    """
    ids = torch.tensor([tokens], device=model.device)
    cache = DynamicCache()
    if press is None:
        model.model(input_ids=ids[:, :prompt], past_key_values=cache)
    else:
        with press(model):
            model.model(input_ids=ids[:, :prompt], past_key_values=cache)
    kept = {layer.keys.shape[2] for layer in cache.layers}
    if len(kept) > 1:
        raise Refused(f"layers kept {sorted(kept)} tokens; take a press that keeps equally many")
    # Keys that stay keep their rotary positions, and so do the tokens that follow.
    positions = torch.arange(prompt, len(tokens) - 1, device=model.device)[None]
    logits = model(
        input_ids=ids[:, prompt:-1], past_key_values=cache, position_ids=positions
    ).logits[0]
    following = ids[0, prompt + 1 :]
    losses = torch.nn.functional.cross_entropy(logits.float(), following, reduction="none")
    return -losses.double().cpu(), kept.pop()


def summed(values: list[float], prompt: int) -> dict[str, Any]:
    """A window's sums over ``CHUNK`` queries; those of the prompt are none."""
    padded = [0.0] * prompt + values
    return {
        "log_likelihoods": [
            round(math.fsum(padded[i : i + CHUNK]), 4) for i in range(0, len(padded), CHUNK)
        ],
        "num_predictions": len(padded),
        "predictions_per_entry": CHUNK,
        "num_unscored": prompt,
    }


def measure(
    model: Any, exported: dict[str, Any], run: dict[str, Any], name: str, ratio: float
) -> dict[str, Any]:
    """The figures of a press at a ratio over the windows of a seed.

    Raises:
        Refused: a log-likelihood is not finite.

    """
    prompt = exported["min_context"] - 1
    press = None if name == DENSE else press_of(name, ratio)
    model.set_attn_implementation("eager" if name in NEEDS_ATTENTION else "sdpa")
    windows, kept = [], 0
    for window in run["windows"]:
        values, kept = log_likelihoods(model, window["tokens"], prompt, press)
        if not values.isfinite().all():
            raise Refused(f"{name} gives the window at {window['start']} no finite log-likelihood")
        windows.append({"start": window["start"], **summed(values.tolist(), prompt)})
    count = sum(window["num_predictions"] - prompt for window in windows)
    total = math.fsum(math.fsum(window["log_likelihoods"]) for window in windows)
    return {
        "press": None if press is None else {"class": type(press).__name__, **asdict(press)},
        "attention": model.config._attn_implementation,
        "kept_tokens": kept,
        "perplexity": math.exp(-total / count),
        "windows": windows,
    }


def main() -> int:
    """Measure what is missing; 2: something that was given is wrong."""
    arguments = _arguments()
    exported = read_windows(arguments.windows)
    if not (arguments.model / "config.json").is_file():
        raise Refused(f"{arguments.model} holds no config.json; give a model folder")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = arguments.dtype or ("bfloat16" if device == "cuda" else "float32")
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, dtype), local_files_only=True
    )
    model = model.to(device).eval()
    source = provenance(device)
    levels = [(name, ratio) for name in arguments.presses for ratio in arguments.ratios]
    for run in exported["runs"]:
        for name, ratio in [(DENSE, 0.0), *levels]:
            head = {
                "schema_version": SCHEMA_VERSION,
                "kind": "kvpress",
                "method": name,
                "compression_ratio": ratio,
                "seed": run["seed"],
                "model": exported["model"],
                "text": exported["text"],
                "context_length": exported["context_length"],
                "min_context": exported["min_context"],
                "tokens_sha256": run["tokens_sha256"],
                "dtype": dtype,
            }
            path = arguments.output / f"{name}_c{ratio:g}_seed{run['seed']}.json"
            if _there(path, {**head, **{part: source[part] for part in _SOURCE}}):
                continue
            made = measure(model, exported, run, name, ratio)
            write_json(path, {**head, "timestamp": timestamp(), **source, **made})
            print(f"{path.name}: {made['perplexity']:.3f}, {made['kept_tokens']} kept", flush=True)
    return 0


def _there(path: Path, wanted: dict[str, Any]) -> bool:
    record = read_json(path) if path.is_file() else {}
    return all(record.get(name) == value for name, value in wanted.items())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=Path, required=True, metavar="FILE")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--presses", nargs="+", choices=PRESSES, default=list(PRESSES))
    parser.add_argument(
        "--ratios", nargs="+", type=float, default=[0.5, 0.875], help="shares taken away"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="[cuda where there is one]")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="[float32 on cpu, bfloat16 on cuda]"
    )
    arguments = parser.parse_args()
    if any(not 0 < ratio < 1 for ratio in arguments.ratios):
        raise Refused("--ratios must lie between 0 and 1")
    return arguments


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Refused as error:
        print(f"kvpress study: {error}", file=sys.stderr)
        sys.exit(2)
