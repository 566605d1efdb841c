"""Models beside plain Llama: what vLLM computes for them stays, and blocks go all the same."""

import pytest
import torch

from .conftest import TINY, make_tiny

LENGTH = 512


@pytest.fixture(scope="module")
def windowed(engine_slot, tmp_path_factory):
    """A random Mistral whose window is as long as its longest sequence: engine and model."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = {**TINY, "max_position_embeddings": 4096, "sliding_window": LENGTH}
    model = MistralForCausalLM(MistralConfig(**config)).float().eval()
    folder = tmp_path_factory.mktemp("tiny-mistral")
    model.save_pretrained(folder)
    llm = engine_slot.get("windowed", lambda: make_tiny(str(folder), {"max_model_len": LENGTH}))
    return llm, model


def score(llm, prompt, extra):
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, extra_args=extra
    )
    # Two, as a request that is alone gets one chunk for its whole prompt.
    outputs = llm.generate([{"prompt_token_ids": prompt}] * 2, params, use_tqdm=False)
    log_probs = [
        entry[token].logprob
        for token, entry in zip(prompt[1:], outputs[0].prompt_logprobs[1:], strict=True)
    ]
    return log_probs, outputs[0].kv_transfer_params["kv_eviction"]


def test_a_window_that_never_binds_is_full_attention(windowed):
    llm, model = windowed
    prompt = torch.randint(0, 256, (LENGTH - 2,), generator=torch.manual_seed(1)).tolist()
    dense, record = score(llm, prompt, {"kv_policy": "h2o", "kv_sparsity": 0})
    assert record["blocks_evicted"] == 0
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0, :-1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert dense == pytest.approx(expected.tolist(), abs=2e-3)
    evicted, record = score(llm, prompt, {"kv_policy": "h2o", "kv_sparsity": 0.7})
    assert record["blocks_evicted"] >= 6
    first = record["first_eviction_tokens"]
    assert evicted[: first - 1] == pytest.approx(dense[: first - 1], abs=1e-4)
    assert evicted[first:] != pytest.approx(dense[first:], abs=1e-2)
