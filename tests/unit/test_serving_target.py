"""What a server says about itself, or refuses to say: keys, models, versions, metrics."""

import pytest

from .serving_stub import METRICS, load, running

GOOD_METRICS = METRICS % 3


def test_the_key_goes_to_every_page_of_the_server(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    pages = {"/version": '{"version": "1.2"}'}
    with running("http_500", after=1, api_key="secret", pages=pages) as (address, stub):
        _, record = load(address, tmp_path)
    assert record["counts"]["succeeded"] == 1
    assert record["target"]["vllm_version"] == "1.2"
    assert record["memory"]["num_gpu_blocks"] == 10
    assert stub.paths_with_key == {
        "/v1/models",
        "/version",
        "/v1/completions",
        "/metrics",
        "/health",
    }
    assert "secret" not in str(record)


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        (None, "asks for an API key (HTTP 401); set OPENAI_API_KEY to"),
        ("wrong", "refuses the API key in OPENAI_API_KEY (HTTP 401)"),
        ("two\nlines", "OPENAI_API_KEY holds line ends"),
    ],
)
def test_a_key_that_is_missing_or_wrong_is_named(key, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with running(api_key="secret") as (address, stub):
        assert load(address, tmp_path) == (2, None)
    error = capsys.readouterr().err
    assert sentence in error
    assert "no OpenAI server" not in error
    assert stub.count == 0


@pytest.mark.parametrize(
    ("models", "sentence"),
    [
        ('{"data": null}', "/v1/models is no list of models ('{\"data\": null}')"),
        ('{"object": "list"}', "is no list of models"),
        ("[1, 2]", "is no list of models"),
        ("<html>hello</html>", "is no list of models ('<html>hello</html>')"),
        ('{"data": []}', "serves no model"),
        ('{"data": [{"root": "x"}, 5, {"id": null}]}', "serves no model"),
    ],
)
def test_a_list_of_models_that_is_none(models, sentence, tmp_path, capsys):
    with running(pages={"/v1/models": models}) as (address, stub):
        assert load(address, tmp_path) == (2, None)
    assert sentence in capsys.readouterr().err
    assert stub.count == 0


def test_models_are_taken_as_far_as_they_can_be_read(tmp_path):
    models = '{"data": [{"object": "x"}, {"id": "m", "root": 5, "max_model_len": NaN}]}'
    pages = {"/v1/models": models, "/version": "<html>200, but no version</html>"}
    with running(pages=pages) as (address, _):
        status, record = load(address, tmp_path)
    assert status == 0
    assert record["target"]["model"] == "m"
    assert record["target"]["max_model_len"] is None
    assert record["target"]["vllm_version"] is None


def test_an_address_with_the_path_of_the_api(tmp_path, capsys):
    with running() as (address, _):
        assert load(f"{address}/v1", tmp_path)[0] == 2
    assert "HTTP 404" in (error := capsys.readouterr().err)
    assert "leave /v1 out of --base-url" in error


@pytest.mark.parametrize("address", ["localhost:8000", "http://localhost:99999", "x y", ""])
def test_an_address_that_is_none(address, tmp_path, capsys):
    assert load(address, tmp_path)[0] == 2
    assert "give its address as --base-url, like http://" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        'vllm:num_requests_running{engine="1"',
        'vllm:num_requests_running{engine="1"} many',
        'vllm:num_requests_running{engine="1"} +Inf',
        'vllm:kv_cache_usage_perc{engine="1"} NaN',
        'vllm:kv_eviction_blocks_evicted_total{engine="1"} 1e999',
    ],
)
def test_a_line_of_metrics_that_is_none_is_a_warning(line, tmp_path):
    pages = {"/metrics": f"{line}\n{GOOD_METRICS}"}
    with running("slow", pages=pages) as (address, _):
        status, record = load(address, tmp_path, "--sample-interval", "0.2")
    assert status == 0
    samples = record["samples"]
    assert len(samples["time_s"]) > 3, "sampling goes on"
    assert samples["num_requests_running"] == [2.0] * len(samples["time_s"])
    assert record["memory"]["num_gpu_blocks"] == 10
    (warning,) = [w for w in record["warnings"] if "/metrics" in w]
    assert f"{len(samples['time_s'])} lines" in warning
    assert warning.endswith(line)


def test_metrics_that_are_refused_are_a_warning_with_its_reason(tmp_path):
    class Refusing(dict):
        def __getitem__(self, path):
            from aiohttp import web

            raise web.HTTPForbidden

    with running(pages=Refusing({"/metrics": ""})) as (address, _):
        status, record = load(address, tmp_path)
    assert status == 0
    assert any("of /metrics failed" in w and "HTTP 403" in w for w in record["warnings"])


def test_a_share_is_not_summed_over_engines(tmp_path):
    engines = "\n".join(f'vllm:kv_cache_usage_perc{{engine="{i}"}} 0.{i}' for i in (4, 8))
    with running(pages={"/metrics": engines}) as (address, _):
        _, record = load(address, tmp_path)
    assert record["samples"]["kv_cache_usage"][0] == pytest.approx(0.6)


LIVE = 'vllm:kv_eviction_live_share{engine="0"} %s\n'


def test_the_record_holds_the_sparsity_that_was_in_force(tmp_path, capsys):
    with running(pages={"/metrics": GOOD_METRICS + LIVE % 0.25}) as (address, stub):
        pages = iter([0.5, 0.25])
        stub.on_request = lambda: stub.pages.update(
            {"/metrics": GOOD_METRICS + LIVE % next(pages, 0.25)}
        )
        status, record = load(address, tmp_path, "--kv-policy", "h2o", "--kv-sparsity", "0.9")
    assert status == 0
    share = record["memory"]["kv_eviction_live_share"]
    samples, (first, last) = record["samples"], record["summary"]["steady"]["span_s"]
    sampled = zip(samples["time_s"], samples["kv_eviction_live_share"], strict=True)
    values = [value for time, value in sampled if first <= time <= last]
    assert share == {"mean": pytest.approx(sum(values) / len(values)), "min": min(values)}
    assert record["memory"]["evicted_share"] == pytest.approx(1 - share["mean"])
    assert "of the blocks that dense would hold" in capsys.readouterr().out


def test_settings_that_a_server_without_the_plugin_ignores_are_told(tmp_path):
    with running() as (address, _):
        _, record = load(address, tmp_path, "--kv-policy", "h2o", "--kv-sparsity", "0.9")
        _, other = load(address, tmp_path)
    told = "no metrics of the plugin, so it may well have ignored kv_policy, kv_sparsity"
    assert any(told in warning for warning in record["warnings"])
    assert not any("plugin" in warning for warning in other["warnings"])


@pytest.mark.parametrize("metrics", [GOOD_METRICS, GOOD_METRICS + LIVE % "NaN"])
def test_the_sparsity_is_unknown_where_nothing_evicts(metrics, tmp_path, capsys):
    with running(pages={"/metrics": metrics}) as (address, _):
        _, record = load(address, tmp_path)
    assert record["memory"]["evicted_share"] is None
    assert "kv_eviction_live_share" not in record["memory"]
    assert record["warnings"] == [w for w in record["warnings"] if "/metrics" not in w]
    assert "dense would hold" not in capsys.readouterr().out
