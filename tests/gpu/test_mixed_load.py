"""Random arrivals in a pool too small for them; blocks conserved at every step."""

import numpy as np
import pytest

from tests.engine.conftest import connector_of

from .engines import NEEDS_GPU, POLICIES, check_idle

pytestmark = NEEDS_GPU


@pytest.mark.parametrize(
    "granularities", [("block",), ("token", "token", "block")], ids=["blocks", "both"]
)
def test_preemption_and_aborts(granularities, engines):
    from vllm import SamplingParams

    llm = engines({}, kv_cache_memory_bytes=32 << 20)
    engine, connector = llm.llm_engine, connector_of(llm)
    rng = np.random.default_rng(7)
    names, arrived, finished = {}, 0, []
    for _ in range(200_000):
        if arrived < 80 and len(names) < 20 and rng.random() < 0.9:
            policy = ("dense", *POLICIES)[arrived % 6]
            extra = {"kv_policy": policy}
            if policy != "dense":
                extra["kv_sparsity"] = float(rng.choice([0.0, 0.5, 0.9]))
                extra["kv_granularity"] = str(rng.choice(granularities))
            prompt = rng.integers(0, 512, size=int(rng.integers(1, 1500))).tolist()
            params = SamplingParams(
                max_tokens=int(rng.integers(1, 300)),
                ignore_eos=True,
                detokenize=False,
                extra_args=extra,
            )
            name = f"{granularities[0]}-{arrived}"
            names[name] = engine.add_request(name, {"prompt_token_ids": prompt}, params)
            arrived += 1
        if names and rng.random() < 0.02:
            name = str(rng.choice(list(names)))
            engine.abort_request([names.pop(name)], internal=True)
        for output in engine.step():
            if output.finished:
                names.pop(output.request_id, None)
                finished.append(output.kv_transfer_params["kv_eviction"])
        connector.check_integrity()
        if arrived == 80 and not engine.has_unfinished_requests():
            break
    assert len(finished) > 40
    assert sum(r["preemptions"] for r in finished) > 0, "the pool was meant to be too small"
    for granularity in set(granularities):
        alike = [r for r in finished if r["granularity"] == granularity]
        assert sum(r["blocks_evicted"] for r in alike) > (
            100 if granularity == granularities[0] else 0
        )
    assert not any("policy_error" in r for r in finished)
    check_idle(llm)
