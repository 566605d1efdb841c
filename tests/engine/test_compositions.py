"""Eviction beside vLLM's other features: each does what it does without, or says what it cannot."""

import asyncio
import copy
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from .conftest import TINY_BLOCK_BYTES, connector_of, end, make_tiny, tiny_arguments
from .test_prefix_caching import check_idle
from .traffic import add

SCHEMA = {
    "type": "object",
    "properties": {
        "policy": {"type": "string", "maxLength": 8},
        "frees": {"type": "boolean"},
        "groups": {"enum": [1, 2, 4]},
    },
    "required": ["policy", "frees", "groups"],
    "additionalProperties": False,
}
DENSE = {"kv_policy": "dense"}
STREAMING = {"kv_policy": "streaming", "kv_sparsity": 0.7, "kv_granularity": "token"}
H2O = {"kv_policy": "h2o", "kv_sparsity": 0.7, "kv_granularity": "block"}


def tokens_of(seed, *lengths):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, size=length).tolist() for length in lengths]


def finish(llm):
    """Outputs by name of all that still run, in the order they end."""
    outputs = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                outputs[output.request_id] = output
        connector_of(llm).check_integrity()
    check_idle(llm)
    return outputs


def answers(outputs):
    return {name: list(output.outputs[0].token_ids) for name, output in outputs.items()}


def record(output):
    return output.kv_transfer_params["kv_eviction"]


def test_priority_says_who_is_preempted_and_changes_no_answer(tiny_engines):
    """Not the last one to come, as without priorities. It starts again, and answers as alone."""
    engine = {"kv_cache_memory_bytes": 42 * TINY_BLOCK_BYTES, "scheduling_policy": "priority"}
    llm = tiny_engines(engine, prefix_caching=True)
    prompts = dict(zip(("low", "evicting", "high"), tokens_of(1, 400, 300, 450), strict=True))
    add(llm, "low", prompts["low"], DENSE, 300, priority=2)
    add(llm, "evicting", prompts["evicting"], H2O, 300, priority=1)
    for _ in range(20):
        llm.llm_engine.step()
    add(llm, "high", prompts["high"], DENSE, 300, priority=0)
    outputs = finish(llm)
    assert record(outputs["high"])["preemptions"] == 0
    assert record(outputs["low"])["preemptions"] > 0
    assert record(outputs["evicting"])["blocks_evicted"] > 0
    assert list(outputs)[-1] == "low"
    assert [len(answer) for answer in answers(outputs).values()] == [300, 300, 300]
    for name in ("low", "high"):
        assert llm.reset_prefix_cache()
        add(llm, name, prompts[name], DENSE, 300)
        assert answers(finish(llm))[name] == answers(outputs)[name]


def pausing(llm):
    """Three requests that have begun to answer."""
    assert llm.reset_prefix_cache()
    settings = (DENSE, STREAMING, H2O)
    for name, prompt, extra in zip("abc", tokens_of(2, 300, 250, 200), settings, strict=True):
        add(llm, name, prompt, extra, 60)
    for _ in range(25):
        llm.llm_engine.step()


def core_of(llm):
    return llm.llm_engine.engine_core.engine_core


def num_tokens(llm):
    states = connector_of(llm).ledger.requests.values()
    return [state.request.num_tokens for state in states]


def test_a_pause_changes_no_answer(tiny_engines):
    """Requests are frozen with what they hold; who comes meanwhile waits."""
    llm = tiny_engines(prefix_caching=True)
    made = []
    for paused in (False, True):
        pausing(llm)
        if paused:
            core_of(llm).pause_scheduler("keep", clear_cache=False)
        add(llm, "d", *tokens_of(3, 120), STREAMING, 20)
        if paused:
            steps = [
                state.request.num_tokens for state in connector_of(llm).ledger.requests.values()
            ]
            for _ in range(5):
                assert not llm.llm_engine.step()
            states = connector_of(llm).ledger.requests.values()
            assert [state.request.num_tokens for state in states] == steps
            core_of(llm).resume_scheduler()
        outputs = finish(llm)
        assert record(outputs["b"])["blocks_evicted"] > 0
        assert record(outputs["c"])["blocks_evicted"] > 0
        made.append(answers(outputs))
    assert made[0] == made[1]


@pytest.mark.parametrize("pause", ["clear the cache", "sleep"])
def test_a_pause_that_clears_the_cache_starts_requests_again(pause, tiny_engines):
    """As new weights ask for it. On a CPU vLLM ignores the levels of sleep, but for this."""
    llm = tiny_engines(prefix_caching=True)
    pausing(llm)
    undisturbed = answers(finish(llm))
    pausing(llm)
    if pause == "sleep":
        llm.sleep(level=1, mode="keep")
        llm.wake_up()
    else:
        core_of(llm).pause_scheduler("keep", clear_cache=True)
        connector_of(llm).check_integrity()
        core_of(llm).resume_scheduler()
    outputs = finish(llm)
    assert [record(outputs[name])["preemptions"] for name in "abc"] == [1, 1, 1]
    assert record(outputs["b"])["blocks_evicted"] > 0
    assert answers(outputs)["a"] == undisturbed["a"]
    assert [len(answer) for answer in answers(outputs).values()] == [60, 60, 60]


def test_a_pause_that_aborts_gives_all_blocks_back(tiny_engines):
    llm = tiny_engines(prefix_caching=True)
    pausing(llm)
    core_of(llm).pause_scheduler("abort", clear_cache=True)
    check_idle(llm)
    assert not connector_of(llm).ledger.requests
    core_of(llm).resume_scheduler()
    llm.llm_engine.abort_request(list("abc"))  # what the front end remembers
    add(llm, "next", *tokens_of(4, 200), STREAMING, 20)
    assert len(answers(finish(llm))["next"]) == 20


def test_a_served_engine_is_paused_and_goes_on(tiny_llama, no_engine):
    """``AsyncLLM``, as a server has it: requests are frozen between two tokens."""
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    # Whole prompts and decisions by position: an answer does not depend on who came when.
    arguments = tiny_arguments({"long_prefill_token_threshold": 1024}, prefix_caching=True)
    prompts = dict(zip("abc", tokens_of(8, 200, 150, 100), strict=True))
    settings = dict(zip("abc", (DENSE, STREAMING, STREAMING), strict=True))

    async def ask(engine, name, progress):
        params = SamplingParams(
            max_tokens=200,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            extra_args=settings[name],
        )
        async for output in engine.generate({"prompt_token_ids": prompts[name]}, params, name):
            progress[name] = len(output.outputs[0].token_ids)
        return list(output.outputs[0].token_ids), record(output)["blocks_evicted"]

    async def answer(engine, paused):
        progress = dict.fromkeys("abc", 0)
        asked = [asyncio.create_task(ask(engine, name, progress)) for name in "abc"]
        if paused:
            while min(progress.values()) < 20:
                await asyncio.sleep(0.001)
            await engine.pause_generation(mode="keep", clear_cache=False)
            held = dict(progress)
            await asyncio.sleep(0.3)
            assert progress == held
            assert max(held.values()) < 200, "they were meant to be in the middle"
            await engine.resume_generation()
        return await asyncio.gather(*asked)

    async def both():
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(tiny_llama[0], **arguments))
        try:
            made = [await answer(engine, paused) for paused in (False, True)]
            await engine.pause_generation(mode="wait", clear_cache=True)
            await engine.resume_generation()
            return made
        finally:
            engine.shutdown()

    undisturbed, paused = asyncio.run(both())
    assert paused == undisturbed
    assert [evicted > 0 for _, evicted in paused] == [False, True, True]


@pytest.fixture(scope="module")
def text_engine(small_llama, engine_slot):
    """Reads text, evicts by position, and computes 512 tokens at a time."""
    engine = {
        "skip_tokenizer_init": False,
        "long_prefill_token_threshold": 1024,
        # Without a grammar for white space a random model writes nothing else.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    settings = {"policy": "streaming", "sparsity": 0.7, "prefix_caching": True}

    def get():
        return engine_slot.get(
            "text", lambda: make_tiny(small_llama, engine, granularity="token", **settings)
        )

    return get


@pytest.mark.parametrize("extra", [H2O, STREAMING, {"kv_policy": "h2o", "kv_sparsity": 0.9}])
def test_structured_output_keeps_its_grammar(extra, text_engine):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    llm = text_engine()
    wanted = [
        StructuredOutputsParams(json=SCHEMA),
        StructuredOutputsParams(regex=r"[0-9]{40}(cab|h2o)"),
    ]
    params = [
        SamplingParams(max_tokens=120, temperature=0.0, structured_outputs=each, extra_args=extra)
        for each in wanted
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in tokens_of(5, 900, 800)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    check_idle(llm)
    made = json.loads(outputs[0].outputs[0].text)
    assert made.keys() == {"policy", "frees", "groups"}
    assert isinstance(made["frees"], bool)
    assert made["groups"] in (1, 2, 4)
    assert re.fullmatch(r"[0-9]{40}(cab|h2o)", outputs[1].outputs[0].text)
    assert all(record(output)["blocks_evicted"] > 10 for output in outputs)


def beams(llm, prompt):
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True)
    (output,) = llm.beam_search([{"prompt_token_ids": prompt}], params)
    return [(beam.tokens[len(prompt) :], beam.cum_logprob) for beam in output.sequences]


def test_beam_search_evicts_between_the_chunks_of_a_prompt_only(
    small_llama, text_engine, engine_slot
):
    """Each step of a beam is a request of its own for one token. A prompt of one chunk is answered
    as by stock vLLM; of a longer one, blocks go before the last chunk, and come back."""
    from vllm import LLM

    whole, longer = tokens_of(6, 400, 900)
    llm = text_engine()
    totals = connector_of(llm).ledger.totals
    before = totals["blocks_evicted"]
    ours = beams(llm, whole)
    assert totals["blocks_evicted"] == before
    again = []
    for _ in range(2):
        assert llm.reset_prefix_cache()
        again.append(beams(llm, longer))
        check_idle(llm)
    assert totals["blocks_evicted"] > before
    assert again[0] == again[1]
    assert [len(tokens) for tokens, _ in again[0]] == [8, 8, 8]
    engine_slot.leave()
    stock = LLM(
        small_llama,
        max_model_len=1024,
        kv_cache_memory_bytes=64 << 20,
        enforce_eager=True,
        dtype="float32",
        block_size=32,
    )
    theirs = beams(stock, whole)
    end(stock)
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
    assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], abs=1e-3)


def save_adapter(folder, model):
    """Write a random adapter of rank 8 for ``model``'s attention, and return the model with it."""
    generator = torch.Generator().manual_seed(0)
    merged, adapter = copy.deepcopy(model), {}
    names = ("q_proj", "k_proj", "v_proj")
    for i, layer in enumerate(merged.model.layers):
        for name in names:
            weight = getattr(layer.self_attn, name).weight
            down = torch.randn(8, weight.shape[1], generator=generator) * 0.1
            up = torch.randn(weight.shape[0], 8, generator=generator) * 0.1
            weight.data += up @ down
            place = f"base_model.model.model.layers.{i}.self_attn.{name}"
            adapter |= {f"{place}.lora_A.weight": down, f"{place}.lora_B.weight": up}
    save_file(adapter, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return merged


@pytest.fixture(scope="module")
def adapter(tiny_llama, tmp_path_factory):
    """Folders of an adapter, and of the small model with it merged in."""
    folder, merged = tmp_path_factory.mktemp("adapter"), tmp_path_factory.mktemp("merged")
    save_adapter(folder, tiny_llama[1]).save_pretrained(merged)
    return str(folder), str(merged)


def test_an_adapter_evicts_as_its_merged_model_does(adapter, tiny_llama, engine_slot):
    """And shares no block with its base model."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    prompts = [{"prompt_token_ids": prompt} for prompt in tokens_of(7, 400, 300)]

    def ask(llm, extra, lora=None):
        params = SamplingParams(
            max_tokens=40, temperature=0.0, ignore_eos=True, detokenize=False, extra_args=extra
        )
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=lora)
        check_idle(llm)
        evicted = [record(output)["blocks_evicted"] for output in outputs]
        return [list(output.outputs[0].token_ids) for output in outputs], evicted, outputs

    folder, merged = adapter
    llm = engine_slot.get(
        "lora",
        lambda: make_tiny(
            tiny_llama[0], {"enable_lora": True, "max_lora_rank": 8}, prefix_caching=True
        ),
    )
    lora = LoRARequest("adapter", 1, folder)
    base, _, _ = ask(llm, DENSE)
    adapted = [ask(llm, DENSE, lora)]
    assert [output.num_cached_tokens for output in adapted[0][2]] == [0, 0], "of another model"
    assert adapted[0][0] != base
    for extra in (STREAMING, H2O):
        assert llm.reset_prefix_cache()
        adapted.append(ask(llm, extra, lora))
        assert all(number > 5 for number in adapted[-1][1])
    llm = engine_slot.get("merged", lambda: make_tiny(merged, prefix_caching=True))
    for extra, (tokens, evicted, _) in zip((DENSE, STREAMING, H2O), adapted, strict=True):
        assert llm.reset_prefix_cache()
        assert ask(llm, extra)[:2] == (tokens, evicted), extra
