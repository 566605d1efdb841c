"""What is sent and when: arrivals, lengths, traces, prompts."""

import math

import numpy as np
import pytest

from harness.client.arrivals import constant, gamma, poisson, ramp, send_times
from harness.client.lengths import Lengths
from harness.client.load_plan import QUALITY, make_plan
from harness.client.load_settings import LoadSpecification
from harness.client.traces import read_trace, replay
from harness.errors import UsageError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
"""
MOONCAKE = """{"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}
{"timestamp": 4000, "input_length": 600, "output_length": 3, "hash_ids": [0, 7]}
"""


def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize(("shape", "deviation"), [(1.0, 1.0), (4.0, 0.5), (0.25, 2.0)])
def test_gamma_gaps_have_the_asked_mean_and_burstiness(shape, deviation):
    gaps = np.diff(gamma(40_000, 5.0, shape, rng()))
    assert gaps.mean() == pytest.approx(0.2, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(deviation, rel=0.05)


def test_poisson_counts_vary_as_much_as_their_mean():
    times = poisson(40_000, 10.0, rng())
    counts = np.histogram(times, np.arange(0, 3_900, 1.0))[0]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.1)


def test_a_ramp_reaches_its_end_rate():
    times = ramp(30_000, 10.0, 50.0, rng())
    assert times[-1] == pytest.approx(1000, rel=0.02)
    assert np.sum(times < 100) == pytest.approx(10 * 100 + 0.5 * 0.04 * 100**2, rel=0.1)
    assert np.sum((times > 800) & (times < 900)) == pytest.approx(4400, rel=0.05)
    down = ramp(30_000, 50.0, 10.0, rng())
    assert np.all(np.diff(down) >= 0)
    assert down[-1] == pytest.approx(1000, rel=0.05)


def test_runs_start_at_once_and_repeat():
    assert constant(3, 4.0).tolist() == [0.0, 0.25, 0.5]
    assert send_times("poisson", 5, math.inf).tolist() == [0.0] * 5
    first = send_times("poisson", 50, 3.0, seed=1)
    assert first[0] == 0.0
    assert first.tolist() == send_times("poisson", 50, 3.0, seed=1).tolist()
    assert first.tolist() != send_times("poisson", 50, 3.0, seed=2).tolist()


@pytest.mark.parametrize(
    ("text", "mean"),
    [("512", 512), ("uniform:100:300", 200), ("normal:200:20", 200), ("lognormal:100:0.5", 113.3)],
)
def test_lengths(text, mean):
    drawn = Lengths.parse(text).draw(20_000, rng())
    assert np.mean(drawn) == pytest.approx(mean, rel=0.02)
    assert min(drawn) >= 1
    assert Lengths.parse(str(Lengths.parse(text))) == Lengths.parse(text)


def test_uniform_includes_both_ends():
    assert set(Lengths.parse("uniform:3:5").draw(200, rng())) == {3, 4, 5}


@pytest.mark.parametrize("text", ["", "abc", "uniform:5", "uniform:9:3", "0", "normal:-5:1", "-3"])
def test_bad_lengths(text):
    with pytest.raises(UsageError, match=r"length .*"):
        Lengths.parse(text)


@pytest.fixture
def traces(tmp_path):
    (tmp_path / "a.csv").write_text(AZURE)
    (tmp_path / "m.jsonl").write_text(MOONCAKE)
    return tmp_path


def test_azure_trace(traces):
    entries = read_trace(traces / "a.csv")
    assert [e.input_length for e in entries] == [374, 396, 879]
    assert [e.output_length for e in entries] == [44, 109, 55]
    assert entries[1].seconds == pytest.approx(4.314579)


def test_time_scale_and_limit(traces):
    entries = replay(read_trace(traces / "a.csv"), 2, 2.0, 600)
    assert [e.input_length for e in entries] == [374, 396]
    assert entries[1].seconds == pytest.approx(4.314579 / 2)
    with pytest.raises(UsageError, match="2 entries of at most 600 tokens"):
        replay(read_trace(traces / "a.csv"), 3, 1.0, 600)


def test_mooncake_prefixes_are_shared_as_recorded(traces):
    specification = LoadSpecification.parse(
        {
            "num_requests": 2,
            "arrivals": "trace",
            "prompts": "trace",
            "trace": str(traces / "m.jsonl"),
            "time_scale": 3,
        }
    )
    first, second = make_plan(specification, 1000, None).requests
    assert (first.send_at, second.send_at) == (0.0, 1.0)
    assert (len(first.prompt), len(second.prompt)) == (1100, 600)
    assert first.prompt[:512] == second.prompt[:512]
    assert first.prompt[512:600] != second.prompt[512:]
    assert second.output_length == 3


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.txt", "", "neither .csv"),
        ("x.csv", "A,B\n1,2\n", "entry 1"),
        ("x.csv", AZURE + "2023-11-16 18:15:52.0,-4,1\n", "entry 4"),
        ("x.jsonl", '{"timestamp": 0}\n', "entry 1"),
        ("x.jsonl", "", "holds no entry"),
        ("missing.csv", None, "cannot read"),
    ],
)
def test_bad_traces(name, content, sentence, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=sentence):
        read_trace(tmp_path / name)


def plan(**values):
    specification = LoadSpecification.parse({"num_requests": 20, "input_length": 8, **values})
    return make_plan(specification, 50, lambda dataset: list(range(500)), 400)


def test_shared_prefixes():
    requests = plan(shared_prefix_length=6, shared_prefix_groups=2).requests
    prefixes = [tuple(r.prompt[:6]) for r in requests]
    assert len(set(prefixes)) == 2
    assert prefixes[0] == prefixes[2] != prefixes[1]
    assert {len(r.prompt) for r in requests} == {14}


def test_text_prompts_are_stretches_of_the_text():
    for request in plan(prompts="text").requests:
        start = request.prompt[0]
        assert request.prompt == list(range(start, start + 8))


def test_quality_requests_are_spread_and_cycle_their_windows():
    made = plan(quality={"share": 0.3, "context_length": 16, "num_windows": 4})
    asked = [r for r in made.requests if r.kind == QUALITY]
    assert [r.window for r in asked] == [0, 1, 2, 3, 0, 1]
    assert all(r.prompt == made.windows[r.window][1] and r.output_length == 1 for r in asked)
    assert {r.index // 10 for r in asked} == {0, 1}


def test_quality_windows_are_those_of_the_offline_command():
    from harness.inputs.windows import draw_windows

    made = plan(quality={"share": 0.2, "context_length": 16, "num_windows": 4}, seed=3)
    assert made.windows == draw_windows([list(range(500))], 4, 16, 3)


def test_the_same_seed_is_the_same_load():
    assert plan(seed=4, request_rate=2.0) == plan(seed=4, request_rate=2.0)
    assert plan(seed=4, request_rate=2.0) != plan(seed=5, request_rate=2.0)


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({"request_rate": 1.5}, 45),
        ({"request_rate": 0.33, "arrivals": "constant"}, 10),
        ({"request_rate": 4, "arrivals": "gamma", "burstiness": 0.5}, 120),
        # A ramp sends at its mean rate.
        ({"request_rate": 1, "ramp_to": 3, "arrivals": "ramp"}, 60),
    ],
)
def test_a_duration_is_a_number_of_requests(values, count):
    given = LoadSpecification.parse({"duration_s": 30, **values})
    assert given.num_requests == count
    assert given == LoadSpecification.parse({"num_requests": count, **values})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"arrivals": "closed", "max_concurrency": 2}, "closed has no rate"),
        ({"arrivals": "trace", "trace": "x.csv"}, "trace has no rate"),
        ({}, "needs a finite --request-rate above 0, not inf"),
        ({"request_rate": -1}, "above 0, not -1"),
        ({"request_rate": 0.01}, "is no request; raise it"),
        ({"request_rate": 2, "duration_s": -30}, "--duration is -30"),
    ],
)
def test_durations_that_are_no_number_of_requests(values, sentence):
    with pytest.raises(UsageError, match=sentence):
        LoadSpecification.parse({"duration_s": 30, **values})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"num_requests": 0}, "--num-requests is 0"),
        ({"request_rate": -1}, "--request-rate is -1"),
        ({"arrivals": "gamma", "burstiness": 0}, "--burstiness is 0"),
        ({"arrivals": "constant"}, "needs a finite --request-rate"),
        ({"arrivals": "ramp", "request_rate": 1}, "needs --ramp-to"),
        ({"arrivals": "closed"}, "belong together"),
        ({"max_concurrency": 3}, "belong together"),
        ({"arrivals": "trace"}, "need --trace FILE"),
        ({"prompts": "poem"}, "use one of: random"),
        ({"slo": ["latency:3"]}, "NAME:MILLISECONDS"),
        ({"quality": {"share": 1.0}}, "--quality-share is 1"),
        ({"quality": {"share": 0.01}}, "is none; raise it"),
        ({"input_length": 401}, "more than the server's max_model_len 400"),
        ({"nonsense": 1}, "nonsense"),
        ({"num_requests": "many"}, "num_requests is 'many'; give a whole number"),
        ({"num_requests": 2.5}, "num_requests is 2.5; give a whole number"),
        ({"request_rate": "fast"}, "request_rate is 'fast'; give a number"),
        ({"quality": {"share": "most"}}, "share is 'most'; give a number"),
        # What would be ignored in silence.
        ({"burstiness": 0.5}, "--burstiness means nothing to --arrivals poisson"),
        ({"ramp_to": 4, "request_rate": 2}, "--ramp-to means nothing to --arrivals poisson"),
        ({"arrivals": "closed", "max_concurrency": 2, "request_rate": 3}, "--request-rate means"),
        ({"duration_s": 30}, "one of --num-requests and --duration"),
        ({"num_requests": None}, "one of --num-requests and --duration"),
    ],
)
def test_bad_loads(values, sentence):
    with pytest.raises(UsageError, match=sentence):
        plan(**values)
