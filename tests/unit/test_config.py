"""Settings are refused with a sentence that says what to change."""

import re
from dataclasses import fields

import pytest

from vllm_plugins.config import EvictionConfig
from vllm_plugins.engine_args import check_has_budget
from vllm_plugins.parsing import EvictionConfigError
from vllm_plugins.policies import Policy, policy_names, registry
from vllm_plugins.refusals.server_settings import decode, encode
from vllm_plugins.request_settings import RequestSettings

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
    ({"policy_args": {"h2o": None}}, "policy_args of h2o is None; give a mapping"),
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
    ({"score_prompt_stride": 3}, "score_prompt_stride is 3; give one of: 1, 2, 4, 8, 16"),
    ({"score_prompt_stride": True}, "score_prompt_stride is True; give a whole number"),
    ({"seed": None}, "seed is None; give a whole number"),
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


AS_TEXT = {
    "policy": ("cab", "cab"),
    "sparsity": ("0.5", 0.5),
    "budget_tokens": ("512", 512),
    "policy_args": ("cab", EvictionConfigError),
    "granularity": ("block", "block"),
    "request_granularity": ("server", "server"),
    "request_budgets": ("any", "any"),
    "sink_blocks": ("0", 0),
    "sink_tokens": ("0", 0),
    "slack_tokens": ("32", 32),
    "min_blocks": ("4", 4),
    "score": ("decay", "decay"),
    "score_half_life": ("128", 128),
    "score_queries": ("32", 32),
    "score_query_stride": ("8", 8),
    "score_prompt_stride": ("4", 4),
    "score_layer_stride": ("2", 2),
    "layer_groups": ("2", 2),
    "request_policies": ("h2o", EvictionConfigError),
    "seed": ("3", 3),
    "check_integrity": ("true", EvictionConfigError),
    "trace_decisions": ("false", EvictionConfigError),
}


@pytest.mark.parametrize("name", [field.name for field in fields(EvictionConfig)])
def test_text_is_what_a_setting_takes_or_refused(name):
    text, meant = AS_TEXT[name]
    if meant is EvictionConfigError:
        with pytest.raises(EvictionConfigError, match=rf"^{name} is '{text}'; give [^\n]+$"):
            EvictionConfig.parse({name: text})
    else:
        value = getattr(EvictionConfig.parse({name: text}), name)
        assert (type(value), value) == (type(meant), meant)


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
    ("given", "named"),
    [
        ({}, policy_names()),
        ({"request_policies": ["h2o", "cab"], "policy": "tova"}, ["cab", "h2o", "tova"]),
        ({"request_policies": []}, ["h2o"]),
        ({"request_granularity": "server", "granularity": "block"}, []),
    ],
)
def test_the_rules_that_an_engine_compiles_for_are_those_that_requests_may_ask_for(given, named):
    made = EvictionConfig.parse(given).token_settings()
    assert [settings.policy for settings in made] == sorted({*named} - {"dense"})


@pytest.mark.parametrize(
    ("sparsity", "num_tokens", "keep"),
    [(0.9, 2048, 7), (0.5, 1024, 16), (0.7, 320, 4), (0.9, 320, 4), (0.9, 3200, 10), (0.5, 33, 4)],
)
def test_relative_budget(sparsity, num_tokens, keep):
    settings = RequestSettings("h2o", sparsity, None, {}, "block")
    assert settings.keep(num_tokens, 32, min_blocks=4) == keep


def test_absolute_budget_counts_full_blocks():
    assert RequestSettings("h2o", 0.0, 100, {}, "block").keep(10_000, 32, min_blocks=4) == 3


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
    for settings in (
        {},
        {"policy": "dense"},
        {"policy": "cab", "sparsity": 0},
        {"policy": "cab", "budget_tokens": 256},
    ):
        check_has_budget(settings)


def test_the_engines_log_says_what_it_does():
    cab = {"policy": "cab", "sparsity": 0.9}
    told = EvictionConfig.parse(cab).summary(False)
    assert "policy cab, sparsity 0.9, tokens for every head; prefix caching is off" in told
    told = EvictionConfig.parse({**cab, "granularity": "block"}).summary(False)
    assert "policy cab, sparsity 0.9, blocks for all heads; prefix caching is off" in told
    assert "policy h2o, 2,048 tokens" in EvictionConfig.parse({"budget_tokens": "2048"}).summary(
        False
    )
    assert "evicts nothing unless a request asks" in EvictionConfig().summary(True)


def test_a_server_can_hold_every_request_to_its_budget():
    config = EvictionConfig.parse(
        {"policy": "h2o", "sparsity": 0.9, "request_budgets": "server", "granularity": "token"}
    )
    for extra in (
        {"kv_policy": "dense"},
        {"kv_sparsity": 0},
        {"kv_sparsity": 0.89},
        {"kv_budget_tokens": 4096},
    ):
        with pytest.raises(EvictionConfigError, match=r"kv_sparsity of at least 0\.9 or none"):
            config.request_settings(extra, 16)
    for extra in (None, {"kv_sparsity": 0.9}, {"kv_policy": "cab", "kv_sparsity": 0.95}):
        assert config.request_settings(extra, 16).evicts
    # A tenth of 8,192 tokens, 32 of slack, two chunks of 256 in flight, and one more block.
    assert config.planned_blocks(8192, 16, 512) == 52 + 2 + 32 + 1
    assert EvictionConfig.parse({"sparsity": 0.9}).planned_blocks(8192, 16, 512) is None
    absolute = EvictionConfig.parse({"budget_tokens": 512, "request_budgets": "server"})
    for extra in ({"kv_budget_tokens": 528}, {"kv_sparsity": 0.99}):
        with pytest.raises(EvictionConfigError, match="kv_budget_tokens of at most 512 or none"):
            absolute.request_settings(extra, 16)
    assert absolute.request_settings({"kv_budget_tokens": 256}, 16).budget_tokens == 256
    with pytest.raises(EvictionConfigError, match="and it has none; give a policy that evicts"):
        EvictionConfig.parse({"request_budgets": "server"})
    with pytest.raises(EvictionConfigError, match="request_budgets is 'all'"):
        EvictionConfig.parse({"request_budgets": "all", "sparsity": 0.5})


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


def test_a_request_may_choose_the_granularity():
    server = EvictionConfig.parse({"policy": "cab", "sparsity": 0.5})
    assert server.request_settings({"kv_granularity": "block"}, 32).rule is None
    settings = server.request_settings({"kv_granularity": "token"}, 32)
    assert settings == server.request_settings({}, 32)
    assert settings.needs == {"tokens", "token_mass"}, "its bridges are keys"
    assert settings.rule.num_recent(10) == 3
    fixed = EvictionConfig.parse({"request_granularity": "server", "granularity": "token"})
    assert fixed.needs() == {"tokens", "token_mass", "token_peak"}
    for extra, sentence in (
        ({"kv_granularity": "head"}, "kv_granularity is 'head'; use one of: default, block, token"),
        ({"kv_granularity": "block"}, "not offered by this server"),
    ):
        with pytest.raises(EvictionConfigError, match=sentence):
            fixed.request_settings(extra, 32)


def test_by_default_a_policy_has_the_form_that_it_can_have(monkeypatch):
    def select(scores, positions, keep, *, num_sink_blocks):
        return positions[-keep:]

    monkeypatch.setitem(registry._BUILT_IN, "mine", Policy("mine", select))
    registry.get_policy.cache_clear()
    server = EvictionConfig.parse({"policy": "h2o", "sparsity": 0.5})
    forman = {"kv_policy": "cab", "kv_policy_args": {"bridge_definition": "forman"}}
    for extra, granularity in (
        ({}, "token"),
        ({"kv_policy": "tova"}, "token"),
        ({"kv_policy": "mine"}, "block"),
        (forman, "block"),
    ):
        assert server.request_settings(extra, 32).granularity == granularity
    fixed = EvictionConfig.parse({"policy": "h2o", "request_granularity": "server"})
    with pytest.raises(EvictionConfigError, match="'block' is not offered by this server"):
        fixed.request_settings({**forman, "kv_sparsity": 0.5}, 32)
    registry.get_policy.cache_clear()


def test_what_means_nothing_at_a_granularity_is_refused():
    server = EvictionConfig.parse({"policy": "dense"})
    for definition, granularity in (("forman", "token"), ("peak", "block"), ("mass", "block")):
        extra = {
            "kv_policy": "cab",
            "kv_sparsity": 0.5,
            "kv_policy_args": {"bridge_definition": definition},
            "kv_granularity": granularity,
        }
        with pytest.raises(EvictionConfigError, match=f"not defined at {granularity} granularity"):
            server.request_settings(extra, 32)


def test_scores_have_a_default_at_each_granularity():
    config = EvictionConfig()
    assert (config.score_at("block"), config.score_at("token")) == ("sum", "mean")
    assert EvictionConfig.parse({"score": "decay"}).score_at("token") == "decay"


def test_a_parameter_that_one_granularity_lacks_does_not_stop_a_server():
    forman = {"cab": {"bridge_definition": "forman"}}
    server = EvictionConfig.parse({"policy": "cab", "sparsity": 0.5, "policy_args": forman})
    assert "graph" in server.needs()
    with pytest.raises(EvictionConfigError, match="not defined at token granularity"):
        server.request_settings({"kv_granularity": "token"}, 32)


def test_a_request_cannot_ask_for_scores_that_nobody_gathers():
    mass = {"cab": {"bridge_definition": "mass"}}
    server = EvictionConfig.parse(
        {
            "policy": "cab",
            "sparsity": 0.5,
            "policy_args": mass,
            "granularity": "token",
            "request_policies": ["cab"],
            "request_granularity": "server",
        }
    )
    assert "token_peak" not in server.needs()
    with pytest.raises(EvictionConfigError, match="does not gather"):
        server.request_settings({"kv_policy_args": {"bridge_definition": "peak"}}, 32)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"score_queries": 32, "score": "mean"}, "score mean divides by all queries"),
        ({"sink_tokens": 200}, "more than a block of 32 tokens can hold"),
        ({"budget_tokens": 32, "sparsity": 0.0}, "below the 2 blocks of 32"),
    ],
)
def test_what_tokens_do_not_take_is_refused(settings, sentence):
    with pytest.raises(EvictionConfigError, match=sentence):
        EvictionConfig.parse(
            {"policy": "h2o", "sparsity": 0.5, "granularity": "token", **settings}
        ).check_budget(32)


def test_slack_is_rounded_up_to_blocks():
    config = EvictionConfig.parse({"slack_tokens": 33})
    assert [config.slack(size) for size in (16, 32, 128)] == [3, 2, 1]
    assert EvictionConfig.parse({"slack_tokens": 0}).slack(16) == 0
