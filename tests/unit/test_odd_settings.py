"""Whatever stands in a study's file, it is taken or refused with a sentence."""

from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest

from harness.client.load_settings import LoadSpecification
from harness.errors import UsageError
from harness.study.batch_specification import Batch
from harness.study.bench_study import BenchStudy
from harness.study.plan import comparisons
from harness.study.points import with_varied
from harness.study.serving_study import ServingStudy
from harness.study.settings import Study
from vllm_plugins.config import EvictionConfig
from vllm_plugins.parsing import EvictionConfigError

BATCH = {"num_requests": 4, "prompt_tokens": 448, "output_tokens": 64}
BASES = {
    Study: {},
    BenchStudy: {"eviction": {}, "load": BATCH},
    ServingStudy: {"eviction": {}, "load": {"num_requests": 3}, "rates": [4]},
}
INNER = {
    **{(kind, "eviction"): EvictionConfig for kind in (BenchStudy, ServingStudy)},
    (BenchStudy, "load"): Batch,
    (ServingStudy, "load"): LoadSpecification,
}
KEYS = [(kind, field.name) for kind in BASES for field in fields(kind)]
INNER_KEYS = [
    (kind, f"{outer}.{field.name}")
    for (kind, outer), settings in INNER.items()
    for field in fields(settings)
]
ODD = (None, "", [], {}, -1, "x")


@pytest.fixture
def parse(tmp_path):
    """Of a kind of study with one setting changed."""
    (tmp_path / "config.json").write_text("{}")
    model = {"model": str(tmp_path)}
    return lambda kind, name, value: kind.parse(
        with_varied({**model, **BASES[kind]}, {name: value})
    )


def plan(study):
    """All that a command asks of a study before an engine starts."""
    study.to_dict()
    if isinstance(study, Study):
        study.without_effect()
        return comparisons(study, Path("out"), "cpu")
    return study.points(Path("out"))


def named(value):
    return value if isinstance(value, str) else value.__name__


@pytest.mark.parametrize(("kind", "name"), KEYS + INNER_KEYS, ids=named)
def test_an_odd_value_is_taken_or_refused(parse, kind, name):
    for value in ODD:
        with suppress(UsageError, EvictionConfigError):
            plan(parse(kind, name, value))


@pytest.mark.parametrize("name", ["methods", "granularity", "dataset", "text_column"])
def test_an_odd_value_may_vary(parse, name):
    for value in ODD:
        with suppress(UsageError, EvictionConfigError):
            plan(parse(Study, "vary", {name: [value]}))


@pytest.mark.parametrize("field", ["policy", "name", "args", "granularity"])
def test_an_odd_value_of_a_method(parse, field):
    for kind in BASES:
        for value in (*ODD, ["x"]):
            with suppress(UsageError, EvictionConfigError):
                plan(parse(kind, "methods", [{"policy": "h2o", field: value}]))


@pytest.mark.parametrize(("kind", "name"), KEYS, ids=named)
def test_a_key_without_a_value_is_refused_unless_it_may_be_none(parse, kind, name):
    if any(field.name == name and field.default is None for field in fields(kind)):
        assert getattr(parse(kind, name, None), name) is None
        return
    sentence = rf"^{name} of a .*study is empty; give a value or remove the line$"
    with pytest.raises(UsageError, match=sentence):
        parse(kind, name, None)


@pytest.mark.parametrize("kind", [BenchStudy, ServingStudy])
@pytest.mark.parametrize("name", ["seed", "min_blocks", "score_query_stride", "slack_tokens"])
def test_a_number_given_as_text_is_the_same_run(parse, kind, name):
    text, number = (parse(kind, f"eviction.{name}", value).runs()[-1] for value in ("8", 8))
    assert text.hash == number.hash
    assert text.effective_sparsity == number.effective_sparsity


def test_a_hypothesis_may_name_a_method_by_the_name_that_it_is_given():
    method = {"policy": "cab", "args": {"bridge_definition": "forman"}}
    told = {"better": "cab-forman", "worse": "h2o"}
    study = Study.parse({"methods": ["h2o", method], "hypotheses": [told]})
    assert not any("is not tested" in note for note in study.without_effect())
