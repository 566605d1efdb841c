"""Quality and speed join where they are one configuration, and nowhere else."""

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from harness.analysis.quality_speed import join
from harness.cli import main
from harness.errors import UsageError
from harness.records.files import read_json, write_json
from harness.report import quality_speed_figure
from harness.report.quality_speed_figure import draw_quality_speed
from vllm_plugins.config import EvictionConfig
from vllm_plugins.policies import get_policy

from .records import batch_record, record

RESULTS = Path(__file__).resolve().parents[2] / "results"
SETTINGS = asdict(EvictionConfig(policy="dense", granularity="token"))
LEVELS = (("h2o", 0.5), ("h2o", 0.9), ("streaming", 0.9))
COSTS = {("h2o", 0.5): 0.05, ("h2o", 0.9): 0.2, ("streaming", 0.9): 0.4}
SPEEDS = {("h2o", 0.5): 150.0, ("h2o", 0.9): 300.0, ("streaming", 0.9): 250.0}
NAMES = ("good", "fast")


def quality_record(method, sparsity, seed=0, engine=None, **eviction):
    """8 tokens of prompt in one chunk, then 12 that are decoded."""
    shift = COSTS.get((method, sparsity), 0.1)
    made = record(method, sparsity, seed, shift, None if method == "dense" else 8)
    made["policy"] = method.removesuffix("-blocks")
    made["avg_cache_size"] = 10.0 * (1 - sparsity)
    specification = made["specification"]
    if method.endswith("-blocks"):
        specification["method"]["granularity"] = "block"
    specification["min_context"] = 8
    specification["engine"] |= {
        "protocol": "decode",
        "prefill_chunk": 8,
        "model_fingerprint": "f",
        "eviction": {**SETTINGS, **eviction},
        **(engine or {}),
    }
    return made


def quality(levels=LEVELS, **settings):
    sides = [("dense", 0.0), *levels]
    return [quality_record(*side, seed, **settings) for seed in (0, 1) for side in sides]


def speed(levels=LEVELS, seeds=(0, 1), engine=None, **eviction):
    evicts = {**SETTINGS, **eviction}
    sides = [("stock", 0.0), *levels]
    return [
        batch_record(*side, seed, SPEEDS.get(side, 100.0) + seed, evicts, **(engine or {}))
        for seed in seeds
        for side in sides
    ]


def test_a_point_has_cost_gain_and_memory_of_one_configuration():
    joined = join(quality(), speed(), NAMES)
    assert [(p.method, p.level) for p in joined.points] == [
        ("h2o", "s0.5"),
        ("h2o", "s0.9"),
        ("streaming", "s0.9"),
    ]
    half = joined.points[0]
    assert half.granularity == "token"
    assert half.change.value == pytest.approx(0.051, abs=0.002)
    assert half.change.low < half.change.value < half.change.high
    assert half.speed["mean"] == pytest.approx(1.5, abs=0.01)
    assert (half.memory_share, half.memory_mib, joined.dense_memory_mib) == (0.5, 5.0, 10.0)
    assert (half.blocks, half.blocks_of_speed) == (5.0, 5.0)


def test_the_fronts_leave_out_what_another_beats_in_both():
    half, tenth, streaming = join(quality(), speed(), NAMES).points
    assert half.on_speed_front
    assert half.on_memory_front
    assert tenth.on_speed_front
    assert tenth.on_memory_front
    assert not streaming.on_speed_front, "H2O at 0.9 is faster and cheaper"
    assert not streaming.on_memory_front, "it holds as much, and is cheaper"


def test_what_is_slower_than_stock_is_on_no_front(monkeypatch):
    assert join(quality(), speed(), NAMES).reference_on_speed_front
    monkeypatch.setitem(SPEEDS, ("h2o", 0.5), 90.0)
    assert not join(quality(), speed(), NAMES).points[0].on_speed_front


def test_stock_is_on_no_front_where_eviction_is_faster_and_costs_less_than_nothing(monkeypatch):
    monkeypatch.setitem(COSTS, ("h2o", 0.5), -0.05)
    joined = join(quality(), speed(), NAMES)
    assert joined.points[0].change.value < 0
    assert not joined.reference_on_speed_front
    assert not joined.reference_on_memory_front


def test_what_only_one_side_measured_is_told():
    joined = join(quality(LEVELS[:2]), speed(LEVELS[1:]), NAMES)
    assert [p.level for p in joined.points] == ["s0.9"]
    assert joined.alone == [
        "h2o by token at 0.5 (quality)",
        "streaming by token at 0.9 (speed)",
    ]


def test_granularity_is_part_of_what_joins_and_a_default_is_what_it_stands_for():
    blocks = [("h2o-blocks", 0.9)]
    with pytest.raises(UsageError, match="nothing joins good"):
        join(quality([("h2o", 0.9)]), speed(blocks), NAMES)
    (point,) = join(quality(blocks), speed(blocks), NAMES).points
    assert point.granularity == "block"
    (point,) = join(
        quality([("h2o", 0.9)]), speed([("h2o", 0.9)], granularity="default"), NAMES
    ).points
    assert point.granularity == "token"


def test_what_a_default_meant_is_part_of_what_joins():
    levels, cab = [("cab", 0.9)], get_policy("cab")

    def meaning(records, bridge="default"):
        own = cab.meant(cab.resolve({"bridge_definition": bridge}), "token")
        return [r | {"parameters": own} if r["policy"] == "cab" else r for r in records]

    assert join(meaning(quality(levels)), meaning(speed(levels)), NAMES).points
    assert join(meaning(quality(levels)), meaning(speed(levels), "key_difference"), NAMES).points
    for other in (meaning(speed(levels), "peak"), speed(levels)):
        with pytest.raises(UsageError, match="nothing joins good"):
            join(meaning(quality(levels)), other, NAMES)


def test_a_score_by_name_is_what_the_default_stands_for():
    levels = [("h2o", 0.9)]
    assert join(quality(levels, score="mean"), speed(levels), NAMES).points
    with pytest.raises(UsageError, match="score sum in good, mean in fast"):
        join(quality(levels, score="sum"), speed(levels), NAMES)


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        ({}, {"engine": {"max_num_batched_tokens": 4}}, "chunk 8 in good, 4 in fast"),
        ({}, {"engine": {"max_num_batched_tokens": None}}, "chunk 8 in good, not recorded in fast"),
        ({}, {"engine": {"long_prefill_token_threshold": 2}}, "chunk 8 in good, 2 in fast"),
        ({}, {"engine": {"kv_cache_dtype": "fp8"}}, "kv_cache_dtype auto in good, fp8 in fast"),
        ({"engine": {"block_size": 2}}, {}, "block size 2 in good, 1 in fast"),
        ({"engine": {"context_length": 24}}, {}, "tokens after the prompt 16 in good, 12 in fast"),
        ({"engine": {"protocol": "chunked"}}, {}, "protocol chunked in good, decode in fast"),
        ({"engine": {"model_fingerprint": "g"}}, {}, "model g in good, f in fast"),
        ({"score_query_stride": 1}, {}, "score_query_stride 1 in good, 8 in fast"),
        ({}, {"slack_tokens": 64}, "slack_tokens 32 in good, 64 in fast"),
    ],
)
def test_other_settings_are_no_one_configuration_and_are_named(ours, theirs, told):
    with pytest.raises(UsageError, match=f"h2o by token at 0.5 is not one configuration: {told};"):
        join(quality(**ours), speed(**theirs), NAMES)


def test_the_dtype_counts():
    fast = [{**made, "dtype": "bfloat16"} for made in speed()]
    with pytest.raises(UsageError, match="dtype float32 in good, bfloat16 in fast"):
        join(quality(), fast, NAMES)


def test_of_several_servers_the_one_of_the_same_settings_is_taken():
    levels = [("h2o", 0.9)]
    other = [
        {**made, "key": "h2o-all_s0.9", "method": "h2o-all", "output_tokens_per_second": 200.0}
        for made in speed(levels, score_query_stride=1)
        if made["policy"] == "h2o"
    ]
    (point,) = join(quality(levels), [*other, *speed(levels)], NAMES).points
    assert point.speed["mean"] == pytest.approx(3.0, abs=0.02)


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        (quality()[1:4], speed(), "good has no run of dense"),
        (quality(), speed()[1:4], "fast has no run of stock"),
        (quality(), [{**made, "kind": "steady"} for made in speed()], "records of kind steady"),
        (quality(), speed(seeds=(0,))[:1] + speed(seeds=(1,))[1:], "no seed with its stock run"),
    ],
)
def test_a_side_without_what_it_is_told_against_is_refused(ours, theirs, told):
    with pytest.raises(UsageError, match=told):
        join(ours, theirs, NAMES)


@pytest.fixture
def folders(tmp_path):
    for made in quality():
        write_json(tmp_path / "good" / f"{made['key']}_ctx20_seed{made['seed']}.json", made)
    for made in speed():
        write_json(tmp_path / "fast" / f"{made['key']}_seed{made['seed']}.json", made)
    return tmp_path / "good", tmp_path / "fast"


def test_the_command_writes_a_page_of_its_own(folders, capsys):
    good, fast = folders
    assert main(["report", str(good), "--speed", str(fast)]) == 0
    assert "quality-speed.md" in capsys.readouterr().out
    page = (good / "quality-speed.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| h2o | token | 0.9 |")]
    assert len(rows) == 1
    assert rows[0].endswith("| 1.0 | 10.0% | 1.0, 5.0 | speed, memory |")
    assert "| dense, stock | - | - | - | 1.00x | 10.0 | 100% | - | speed, memory |" in page
    assert "report DIR --speed SPEED_DIR" in page
    assert (good / "quality-speed.png").stat().st_size > 10_000
    assert len(read_json(good / "quality-speed.json")["points"]) == 3
    assert not (good / "report.md").exists()


def test_the_command_ends_with_a_sentence_where_nothing_joins(folders, tmp_path, capsys):
    good, fast = folders
    assert main(["report", str(good), "--speed", str(good)]) == 2
    assert main(["report", str(good), "--speed", str(tmp_path / "none")]) == 2
    assert "none is no folder" in capsys.readouterr().err
    points = [{"varied": {"dataset": name}, "folder": name} for name in ("prose", "code")]
    write_json(good / "experiment.json", {"comparisons": points})
    assert main(["report", str(good), "--speed", str(fast)]) == 2
    assert f"name the folder of one point, like {good / 'prose'}" in capsys.readouterr().err


def test_labels_hide_no_marker_and_no_other_label(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(quality_speed_figure, "save", lambda figure, path: drawn.append(figure))
    draw_quality_speed(join(quality(), speed(), NAMES), tmp_path / "x")
    speed_axes, memory_axes = drawn[0].axes
    assert speed_axes.get_xlabel() == "output throughput (times stock vLLM's)"
    assert memory_axes.get_xlim()[0] > memory_axes.get_xlim()[1], "less memory lies to the right"
    for axes in drawn[0].axes:
        assert sorted(text.get_text() for text in axes.texts) == ["0.5", "0.9", "0.9"]
        boxes = [text.get_window_extent() for text in axes.texts]
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_the_committed_page_follows_from_committed_records(tmp_path):
    for name in ("as-served", "serving-gpu/as-served"):
        shutil.copytree(
            RESULTS / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("*.png", "*.md", "*.html"),
        )
    good, fast = tmp_path / "as-served", tmp_path / "serving-gpu" / "as-served"
    assert main(["report", str(good), "--speed", str(fast)]) == 0
    for kind in ("md", "png"):
        kept = RESULTS / "as-served" / f"quality-speed.{kind}"
        made = good / kept.name
        assert made.read_bytes() == kept.read_bytes(), "run kv-eviction report"
