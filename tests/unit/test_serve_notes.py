"""What ``kv-eviction serve`` says of its settings before the engine starts."""

import os

import pytest

from harness.cli import main
from harness.commands.serve_notes import settings_notes
from vllm_plugins.config import EvictionConfig
from vllm_plugins.without_effect import without_effect


def notes(length=8192, **settings):
    config = EvictionConfig.parse(settings)
    return "\n".join(settings_notes(config, settings, 32, length))


def test_a_budget_is_told_in_tokens_and_blocks():
    told = notes(policy="h2o", sparsity=0.9, slack_tokens=40)
    assert "a request of 8,192 tokens keeps at most 832 tokens, 26 blocks of 32" in told
    assert "packed when it holds 64 tokens more (slack)" in told
    told = notes(policy="h2o", sparsity=0.9, granularity="block", length=None)
    assert "keeps at least 4 blocks of 32 tokens, and 0.1 of its own" in told
    assert "at block granularity there is no slack" in told
    told = notes(policy="streaming", budget_tokens=512, length=None)
    assert "a request keeps at most 512 tokens, 16 blocks of 32" in told


def test_scoring_is_told_as_it_is_sampled():
    told = notes(policy="h2o", sparsity=0.9)
    assert "averaged over the queries that saw it; all of a chunk's queries are scored" in told
    assert "(before its last 256 one in 4), of a decode one in 8, in every layer" in told
    told = notes(policy="cab", sparsity=0.9, granularity="block", score="decay", score_queries=16)
    assert "each block is summed with a half-life of 256 tokens; the last 16 queries" in told
    assert "in one layer of 4" in told
    assert "streaming reads no attention scores" in notes(policy="streaming", sparsity=0.9)


def test_what_requests_may_choose_is_told():
    assert "any policy; any budget, so memory is planned by length; any granularity" in notes()
    told = notes(
        policy="h2o",
        sparsity=0.9,
        request_policies=["cab", "h2o"],
        request_budgets="server",
        request_granularity="server",
    )
    assert "may choose cab; no more than the server's budget" in told
    assert "no other granularity" in told
    assert "choose no other policy" in notes(policy="h2o", sparsity=0.9, request_policies=[])


ALONE = {"request_policies": [], "request_granularity": "server"}


@pytest.mark.parametrize(
    ("settings", "name", "reason"),
    [
        ({"policy": "h2o"}, "sink_blocks", "policies that evict at block granularity read it"),
        ({"policy": "h2o", **ALONE}, "sink_blocks", "and this server offers none"),
        ({"policy": "h2o", "granularity": "block"}, "slack_tokens", "at token granularity"),
        ({"policy": "h2o", "granularity": "block"}, "sink_tokens", "at token granularity"),
        ({"policy": "h2o"}, "score_layer_stride", "score attention at block granularity"),
        ({"policy": "streaming"}, "score_query_stride", "server's own policy"),
        ({"policy": "streaming", **ALONE}, "score", "and this server offers none"),
        ({"policy": "h2o"}, "score_half_life", "score is default, which has no half-life"),
        ({"policy": "h2o", "budget_tokens": 512}, "min_blocks", "budget, which is absolute"),
    ],
)
def test_a_setting_that_nobody_reads_is_named(settings, name, reason):
    budget = {} if "budget_tokens" in settings else {"sparsity": 0.9}
    config = EvictionConfig.parse({**settings, **budget})
    assert reason in without_effect(config, [name])[name]
    assert without_effect(config, []) == {}


def test_parameters_of_a_policy_that_nobody_can_ask_for_are_named():
    settings = {"policy": "h2o", "sparsity": 0.9, "policy_args": {"h2o": {}, "cab": {}}}
    narrow = EvictionConfig.parse({**settings, "request_policies": ["streaming"]})
    assert "has no effect for cab:" in without_effect(narrow, settings)["policy_args"]
    assert without_effect(EvictionConfig.parse(settings), settings) == {}


def test_a_setting_that_is_read_is_not_named():
    read = {
        "token": ["sink_tokens", "slack_tokens", "min_blocks", "layer_groups", "score"],
        "block": ["sink_blocks", "score_layer_stride", "score_query_stride", "score_queries"],
    }
    for granularity, names in read.items():
        settings = {"policy": "cab", "sparsity": 0.5, "granularity": granularity}
        assert without_effect(EvictionConfig.parse(settings), names) == {}
    by_request = EvictionConfig.parse({"policy": "cab"})
    assert without_effect(by_request, [*read["token"], *read["block"]]) == {}
    decay = EvictionConfig.parse({"policy": "h2o", "sparsity": 0.5, "score": "decay"})
    assert without_effect(decay, ["score_half_life"]) == {}


def test_serve_says_which_flag_has_no_effect(smollm2, capsys):
    flags = ["--policy", "streaming", "--sparsity", "0.9", "--score-query-stride", "4"]
    assert main(["serve", smollm2, *flags, "--print-command"]) == 0
    told = capsys.readouterr().err
    assert "kv-eviction: --score-query-stride has no effect on the server's own policy" in told
    assert "lines of its log that begin with 'KV eviction:'" in told


def test_vllm_starts_in_the_users_own_environment(smollm2, monkeypatch, capsys):
    """Looking at the platform quietens vLLM; a server has to log."""
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SOME_SETTING", "of the user")
    started = {}

    def execve(path, command, environment):
        started.update(environment)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(SystemExit):
        main(["serve", smollm2, "--policy", "h2o", "--sparsity", "0.9", "--uds", "/nowhere"])
    assert started["SOME_SETTING"] == "of the user"
    assert "VLLM_LOGGING_LEVEL" not in started
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in started
