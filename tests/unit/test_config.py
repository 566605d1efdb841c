"""Settings are refused with a sentence that says what to change."""

import re

import pytest

from vllm_plugins.config import EvictionConfig, EvictionConfigError, RequestSettings
from vllm_plugins.engine_args import check_has_budget
from vllm_plugins.refusals.server_settings import decode, encode

BAD = [
    ({"policy": "h20"}, "unknown policy 'h20'"),
    ({"sparsity": 1.0}, "sparsity is 1.0; give a number from 0"),
    ({"sparsity": -0.1}, "sparsity is -0.1"),
    ({"sparsity": "abc"}, "sparsity is 'abc'"),
    ({"sparsity": True}, "sparsity is True"),
    ({"sparsity": float("nan")}, "sparsity is nan"),
    ({"sparsty": 0.5}, "unknown eviction setting 'sparsty'; did you mean 'sparsity'"),
    ({"policy_args": {"h2o": {"recent": 0.9}}}, "sum to 1"),
    ({"policy_args": {"cab": {"local": 0.9}}}, "sum to 1"),
    ({"policy_args": {"h2o": 3}}, "give a mapping"),
    ({"policy_args": 3}, "give a mapping"),
    ({"policy": "dense", "sparsity": 0.5}, "would do nothing"),
    ({"sparsity": 0.5, "budget_tokens": 512}, "not both"),
    ({"budget_tokens": 0}, "budget_tokens is 0"),
    ({"sink_blocks": -1}, "sink_blocks is -1"),
    ({"sink_blocks": 4}, "min_blocks to at least 5"),
    ({"layer_groups": 0}, "layer_groups is 0"),
    ({"layer_groups": 1.5}, "layer_groups is 1.5"),
    ({"score": "max"}, "sum, mean, decay"),
    ({"score_queries": 0}, 'give "all"'),
    ({"score_queries": "last"}, 'give "all"'),
    ({"request_policies": ["h2o", "nope"]}, "unknown policy 'nope'"),
    ({"request_policies": 3}, 'give "any" or a list'),
    ({"check_integrity": "yes"}, "true or false"),
    ({"score_every": 8}, "now called score_query_stride (--score-query-stride)"),
    ({"score_layers": 4}, "now called score_layer_stride (--score-layer-stride)"),
]


@pytest.mark.parametrize(("settings", "sentence"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_server_settings(settings, sentence):
    with pytest.raises(EvictionConfigError, match=r".+") as error:
        EvictionConfig.parse(settings)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_survive_json():
    config = EvictionConfig.parse(
        {"policy": "cab", "sparsity": "0.9", "request_policies": ["h2o"], "score_queries": "32"}
    )
    assert config.sparsity == 0.9
    assert config.score_queries == 32
    assert EvictionConfig.parse(config.to_dict()) == config


def test_budget_must_hold_the_protected_blocks():
    config = EvictionConfig.parse({"budget_tokens": 63})
    with pytest.raises(EvictionConfigError, match="at least 64"):
        config.check_budget(32)
    EvictionConfig.parse({"budget_tokens": 64}).check_budget(32)


BAD_REQUESTS = [
    ({"kv_policy": "nope"}, "unknown policy"),
    ({"kv_policy": 7}, "unknown policy"),
    ({"kv_sparsity": 1}, "kv_sparsity is 1"),
    ({"kv_sparsity": None}, "kv_sparsity is None"),
    ({"kv_sparsity": 0.5, "kv_budget_tokens": 512}, "not both"),
    ({"kv_budget_tokens": 40}, "give at least 64"),
    ({"kv_budget_tokens": "many"}, "kv_budget_tokens is 'many'"),
    ({"kv_policy": "dense", "kv_sparsity": 0.5}, "would do nothing"),
    ({"kv_polcy": "h2o"}, "did you mean 'kv_policy'"),
    ({"kv_policy_args": {"local": 1.0}}, "no parameter 'local'"),
    ({"kv_policy_args": "local"}, "give a mapping"),
    ({"kv_policy_args": '["recent"]'}, "give a mapping"),
    # Everything that looks like ours and would be ignored.
    ({"sparsity": 0.5}, "did you mean 'kv_sparsity'"),
    ({"policy": "cab"}, "did you mean 'kv_policy'"),
    ({"KV-Sparsity": 0.5}, "did you mean 'kv_sparsity'"),
    ({"kv_layer_groups": 2}, "setting of the server, not of a request"),
    ({"sink_blocks": 2}, "setting of the server, not of a request"),
    ({"score_every": 2}, "start the server with it (--score-query-stride)"),
    ({"kv_other": 2}, "unknown request setting 'kv_other'; known: kv_budget_tokens"),
    ({"kv_transfer_params": {"kv_policy": "h2o"}}, "kv_policy stands in kv_transfer_params"),
    # What JSON and Python let through.
    ({"kv_budget_tokens": None}, "kv_budget_tokens is None"),
    ({"kv_budget_tokens": "²"}, "give a whole number"),
    ({"kv_policy_args": "[" * 5000}, "give a mapping"),
    ({"kv_policy_args": '{"recent": NaN}'}, "parameter recent of policy h2o is nan"),
    ({"kv_policy_args": {"recent": float("inf")}}, "parameter recent of policy h2o is inf"),
    ({"kv_policy_args": {"recent": True}}, "parameter recent of policy h2o is True"),
]


@pytest.mark.parametrize(
    ("extra", "sentence"), BAD_REQUESTS, ids=[str(b[0])[:60] for b in BAD_REQUESTS]
)
def test_bad_request_settings(extra, sentence):
    with pytest.raises(EvictionConfigError) as error:
        EvictionConfig.parse({"policy": "h2o", "sparsity": 0.5}).request_settings(extra, 32)
    assert sentence in str(error.value)
    assert len(str(error.value)) < 300, "a sentence, whatever was sent"


def test_a_request_follows_the_server_unless_it_says_otherwise():
    server = EvictionConfig.parse({"policy": "h2o", "sparsity": 0.5})
    others = {"kv_transfer_params": {}, "kv_cache_report_mode": "full", "other": 1, "seed": 1}
    settings = server.request_settings(others, 32)
    assert (settings.policy, settings.sparsity) == ("h2o", 0.5)
    settings = server.request_settings({"kv_policy": "cab"}, 32)
    assert (settings.policy, settings.sparsity) == ("cab", 0.5)
    settings = server.request_settings({"kv_budget_tokens": "512"}, 32)
    assert (settings.sparsity, settings.budget_tokens) == (0.0, 512)
    for args in ({"bridge_definition": "forman"}, '{"bridge_definition": "forman"}'):
        settings = server.request_settings({"kv_policy": "cab", "kv_policy_args": args}, 32)
        assert settings.policy_args["bridge_definition"] == "forman"
    assert not server.request_settings({"kv_policy": "dense"}, 32).evicts
    assert not server.request_settings({"kv_sparsity": 0}, 32).evicts


def test_a_server_may_narrow_the_policies_and_so_the_scores():
    server = EvictionConfig.parse({"policy": "streaming", "request_policies": ["random"]})
    assert server.needs() == {"chance", "tokens"}
    with pytest.raises(EvictionConfigError, match="random, streaming"):
        server.request_settings({"kv_policy": "h2o"}, 32)
    assert {"attention", "key_norm", "graph"} <= EvictionConfig().needs()


@pytest.mark.parametrize(
    ("sparsity", "num_tokens", "keep"),
    [(0.9, 2048, 7), (0.5, 1024, 16), (0.7, 320, 4), (0.9, 320, 4), (0.9, 3200, 10), (0.5, 33, 4)],
)
def test_relative_budget(sparsity, num_tokens, keep):
    settings = RequestSettings("h2o", sparsity, None, {})
    assert settings.keep(num_tokens, 32, min_blocks=4) == keep


def test_absolute_budget_counts_full_blocks():
    assert RequestSettings("h2o", 0.0, 100, {}).keep(10_000, 32, min_blocks=4) == 3


@pytest.mark.parametrize(
    ("asked", "num_tokens", "effective"),
    [
        ({"kv_sparsity": 0.9}, 1024, 0.875),  # four blocks of 32 always stay
        ({"kv_sparsity": 0.9}, 128, 0.0),
        ({"kv_sparsity": 0.5}, 1024, 0.5),
        ({"kv_sparsity": 0.0}, 1024, 0.0),
        ({"kv_budget_tokens": 256}, 1024, 0.75),
        ({"kv_budget_tokens": 4096}, 1024, 0.0),
        ({"kv_policy": "dense"}, 1024, 0.0),
    ],
)
def test_effective_sparsity_is_what_the_budget_leaves(asked, num_tokens, effective):
    settings = EvictionConfig().request_settings(asked, 32)
    assert settings.effective_sparsity(num_tokens, 32, min_blocks=4) == pytest.approx(effective)


def test_a_policy_that_was_chosen_to_evict_needs_a_budget():
    for settings in ({"policy": "cab"}, {"policy": "h2o", "budget_tokens": None}):
        with pytest.raises(EvictionConfigError, match="evicts nothing without a budget"):
            check_has_budget(settings)
    for settings in ({}, {"policy": "dense"}, {"policy": "cab", "sparsity": 0},
                     {"policy": "cab", "budget_tokens": 256}):  # fmt: skip
        check_has_budget(settings)


def test_the_engines_log_says_what_it_does():
    assert (
        "policy cab, sparsity 0.9; prefix caching is off"
        in EvictionConfig.parse({"policy": "cab", "sparsity": 0.9}).summary()
    )
    assert "policy h2o, 2,048 tokens" in EvictionConfig.parse({"budget_tokens": "2048"}).summary()
    assert "evicts nothing unless a request asks" in EvictionConfig().summary()


def test_a_servers_settings_travel_in_one_word():
    config = EvictionConfig.parse(
        {"policy": "cab", "sparsity": 0.9, "request_policies": ["h2o"], "sink_blocks": 2}
    )
    word = encode(config, 64)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", word), "a name between ':' and '.'"
    assert decode(word) == (config, 64)
    for other in ("", "MQ", "validate_params", "e30", word[:-4]):
        with pytest.raises(ValueError, match=r"."):
            decode(other)
