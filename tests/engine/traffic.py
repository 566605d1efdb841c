"""Requests of one's own choice, added while an engine runs."""

from vllm_plugins.policies import get_policy

from .conftest import connector_of


def add(llm, name, tokens, extra, max_tokens):
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        extra_args=extra,
    )
    return llm.llm_engine.add_request(name, {"prompt_token_ids": tokens}, params)


def forms_of(name):
    policy = get_policy(name)
    return ["block"] * (policy.select is not None) + ["token"] * (policy.tokens is not None)


def random_traffic(llm, rng, number, make):
    """``number`` requests that come at random times, some of which are aborted; blocks are
    conserved after every step. Outputs by name of those that finished.

    ``make``: from a request's place to its prompt, settings and number of output tokens.
    """
    connector, engine = connector_of(llm), llm.llm_engine
    names, arrived, outputs = {}, 0, {}
    finished = False
    for _ in range(100_000):
        if arrived < number and len(names) < 12 and rng.random() < 0.5:
            name = f"r{arrived}"
            names[name] = add(llm, name, *make(arrived))
            arrived += 1
        if names and rng.random() < 0.03:
            name = str(rng.choice(list(names)))
            engine.abort_request([names.pop(name)], internal=True)
        for output in engine.step():
            if output.finished:
                names.pop(output.request_id)
                outputs[output.request_id] = output
        connector.check_integrity()
        finished = arrived == number and not engine.has_unfinished_requests()
        if finished:
            break
    assert finished
    assert not names
    return outputs
