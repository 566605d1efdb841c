"""Kernels of ours that are compiled while an engine serves, not while it starts.

python -m tests.gpu.compilations MODEL SETTINGS OUTPUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .engines import check_idle, generate, records, start


def compiled_late(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Names of the kernels, and how many blocks each request lost.

    ``settings``: of eviction; under ``engine`` what else the engine is started with, and under
    ``asked`` the settings that some requests bring.
    """
    from triton import knobs

    settings = dict(settings)
    engine, asked = settings.pop("engine", {}), settings.pop("asked", [])
    llm = start({"policy": "h2o", "sparsity": 0.9, **settings}, model=model, **engine)
    compiled = []
    theirs = knobs.runtime.jit_post_compile_hook

    def note(**given: Any) -> Any:
        function = given["fn"]
        if function.jit_function.fn.__module__.startswith("vllm_plugins"):
            compiled.append(function.name)
        return theirs(**given) if theirs is not None else None

    knobs.runtime.jit_post_compile_hook = note
    rng = np.random.default_rng(3)
    # Alone and together, in one chunk and in several, at lengths that share no divisor.
    prompts = [rng.integers(0, 512, size=n).tolist() for n in (700, 16, 1023, 2048, 333, 3500, 1)]
    made = records([*generate(llm, prompts[:1], None, 150), *generate(llm, prompts, None, 200)])
    for extra in asked:
        made += records(generate(llm, prompts[:5], extra, 60))
    check_idle(llm)
    llm.llm_engine.engine_core.shutdown()
    return {"compiled": compiled, "evicted": [record["blocks_evicted"] for record in made]}


if __name__ == "__main__":
    folder, given, path = sys.argv[1:]
    Path(path).write_text(json.dumps(compiled_late(folder, json.loads(given))))
    sys.stdout.flush()
    os._exit(0)  # the answer is written; an engine can stumble while the interpreter exits
