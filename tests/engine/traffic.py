"""Requests of one's own choice, added while an engine runs."""

from vllm_plugins.policies import get_policy

from .conftest import connector_of


def add(llm, name, tokens, extra, max_tokens, priority=0, **sampling):
    """A request arrives; its name inside the engine. ``sampling``: of ``SamplingParams``, in place
    of greedy answers of exactly ``max_tokens``."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        output_kind=RequestOutputKind.FINAL_ONLY,  # else of samples the last one to end alone
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args=extra,
        **{"temperature": 0.0, **sampling},
    )
    prompt = {"prompt_token_ids": tokens}
    return llm.llm_engine.add_request(name, prompt, params, priority=priority)


def forms_of(name):
    policy = get_policy(name)
    return ["block"] * (policy.select is not None) + ["token"] * (policy.tokens is not None)


def families(rng, vocabulary, longest_shared, longest_own, longest_answer):
    """Requests of every policy, or of none, that begin as others do: what each asks for by its
    name, filled as they are made, and the ``make`` of ``random_traffic``."""
    roots = [rng.integers(0, vocabulary, size=longest_shared).tolist() for _ in range(3)]
    policies = ("dense", "h2o", "cab", "streaming", "random", "key_norm", "snapkv", "keydiff")
    asked = {}

    def make(place):
        policy = policies[place % len(policies)]
        extra = {"kv_policy": policy}
        if policy != "dense":
            extra["kv_sparsity"] = float(rng.choice([0.0, 0.5, 0.9]))
            extra["kv_granularity"] = str(rng.choice(forms_of(policy)))
        shared = roots[int(rng.integers(3))][: int(rng.integers(1, longest_shared))]
        own = rng.integers(0, vocabulary, size=int(rng.integers(1, longest_own))).tolist()
        max_tokens = int(rng.integers(1, longest_answer))
        asked[f"r{place}"] = {"tokens": shared + own, "extra": extra, "max_tokens": max_tokens}
        return asked[f"r{place}"]

    return asked, make


def random_traffic(llm, rng, number, make, outputs=None, after_step=lambda: None):
    """``number`` requests that come at random times, some of which are aborted; blocks are
    conserved after every step. Outputs by name of those that finished, which are all others.

    ``make``: from a request's place to the further arguments of ``add``. ``outputs``: gets them as
    they come.
    """
    connector, engine = connector_of(llm), llm.llm_engine
    outputs = {} if outputs is None else outputs
    names, arrived = {}, 0
    finished = False
    for _ in range(100_000):
        if arrived < number and len(names) < 12 and rng.random() < 0.5:
            name = f"r{arrived}"
            names[name] = add(llm, name, **make(arrived))
            arrived += 1
        if names and rng.random() < 0.03:
            name = str(rng.choice(list(names)))
            engine.abort_request([names.pop(name)], internal=True)
        for output in engine.step():
            if output.finished:
                names.pop(output.request_id)
                outputs[output.request_id] = output
        connector.check_integrity()
        after_step()
        finished = arrived == number and not engine.has_unfinished_requests()
        if finished:
            break
    assert finished
    assert not names
    return outputs
