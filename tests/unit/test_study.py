"""Studies: what their settings mean, and what is refused."""

import shutil
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.records.specifications import order
from harness.study.plan import comparisons
from harness.study.settings import Study, read_study
from harness.study.specification import OfflineRun
from vllm_plugins.config import EvictionConfig
from vllm_plugins.parsing import EvictionConfigError

STUDIES = sorted((Path(__file__).resolve().parents[2] / "scripts" / "studies").glob("*.yaml"))


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "tiny-model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 8}')
    return folder


def points(settings, device="cpu", folder=Path("out")):
    return comparisons(Study.parse(settings), folder, device)


def runs(settings, device="cpu") -> list[OfflineRun]:
    (point,) = points(settings, device)
    return list(point.runs)


def test_runs_of_a_comparison(model):
    made = runs(
        {"model": str(model), "methods": ["dense", "h2o"], "sparsity": ["0.5", 0.9], "num_runs": 2}
    )
    keys = ("dense_s0.0", "h2o_s0.5", "h2o_s0.9")
    assert [run.file_name for run in made] == [
        f"{key}_ctx1024_seed{seed}.json" for seed in (0, 1) for key in keys
    ]
    assert made[0].settings == {"kv_policy": "dense"}
    assert made[1].settings == {"kv_policy": "h2o", "kv_sparsity": 0.5}
    assert len({run.hash for run in made}) == 6
    assert len({run.comparison for run in made}) == 1


def test_the_type_of_a_cache_is_told_where_it_is_not_the_models(model):
    """Records from before the setting are of the same specification."""
    (plain,) = runs({"model": str(model), "methods": ["dense"]})
    assert "kv_cache_dtype" not in plain.to_dict()["engine"]
    (narrow,) = runs({"model": str(model), "methods": ["dense"], "kv_cache_dtype": "fp8"})
    assert narrow.to_dict()["engine"]["kv_cache_dtype"] == "fp8"
    assert narrow.comparison != plain.comparison
    vary = {"kv_cache_dtype": ["auto", "fp8_e5m2"]}
    with pytest.raises(UsageError, match="--kv-cache-dtype must be one of: auto, fp8, fp8_e4m3"):
        points({"model": str(model), "methods": ["dense"], "vary": vary})


def test_methods_with_parameters_and_budgets(model):
    bridges = {"policy": "cab", "args": {"bridge_definition": "forman"}}
    made = runs(
        {"model": str(model), "methods": ["dense", bridges], "sparsity": [], "budget_tokens": [256]}
    )
    assert [run.key for run in made] == ["dense_s0.0", "cab-forman_b256"]
    assert made[1].settings == {
        "kv_policy": "cab",
        "kv_policy_args": {"bridge_definition": "forman"},
        "kv_budget_tokens": 256,
    }


def test_a_specification_is_the_same_wherever_files_lie(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("words")
    here = runs({"model": str(model), "dataset": f"text:{text}"})
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copytree(model, moved / "tiny-model")
    shutil.copy(text, moved / "text.txt")
    there = runs({"model": str(moved / "tiny-model"), "dataset": f"text:{moved}/text.txt"})
    assert [run.hash for run in here] == [run.hash for run in there]
    assert str(tmp_path) not in str(here[0].to_dict())
    (moved / "text.txt").write_text("other words")
    (moved / "tiny-model" / "config.json").write_text('{"hidden_size": 16}')
    for changed in ({"dataset": f"text:{moved}/text.txt"}, {"model": f"{moved}/tiny-model"}):
        other = runs({"model": str(model), "dataset": f"text:{text}", **changed})
        assert other[0].hash != here[0].hash


def test_a_specification_is_the_same_wherever_and_by_whatever_the_model_was_made(model):
    here = runs({"model": str(model)})[0].hash
    (model / "config.json").write_text(
        '{"hidden_size": 8, "_name_or_path": "/a/b", "transformers_version": "5.0"}'
    )
    assert runs({"model": str(model)})[0].hash == here
    (model / "config.json").write_text('{"hidden_size": 16}')
    assert runs({"model": str(model)})[0].hash != here


@pytest.mark.parametrize(
    ("settings", "effective"),
    [
        ({"sparsity": [0.9]}, 0.875),
        ({"sparsity": [0.9], "context_length": 2048}, 1 - 7 / 64),
        ({"sparsity": [0.5]}, 0.5),
        ({"sparsity": [0.9], "context_length": 320}, 0.6),
        ({"sparsity": [0.9], "context_length": 320, "min_blocks": 2}, 0.8),
        ({"sparsity": [], "budget_tokens": [256]}, 0.75),
        ({"sparsity": [], "budget_tokens": [100]}, 1 - 3 / 32),
        ({"sparsity": [0.0]}, 0.0),
    ],
)
def test_the_effective_sparsity_is_what_the_plugins_budget_leaves(model, settings, effective):
    dense, h2o = runs({"model": str(model), "methods": ["dense", "h2o"], **settings})
    assert h2o.effective_sparsity == pytest.approx(effective)
    assert dense.effective_sparsity == 0.0
    config = EvictionConfig.parse(h2o.resource.eviction)
    asked = config.request_settings(h2o.settings, h2o.resource.block_size)
    keep = asked.keep(h2o.resource.context_length, h2o.resource.block_size, config.min_blocks)
    blocks = h2o.resource.context_length / h2o.resource.block_size
    assert h2o.effective_sparsity == pytest.approx(max(0, 1 - keep / blocks))


def test_devices_settle_what_is_left_open(model):
    cpu, cuda = (runs({"model": str(model)}, device)[0].resource for device in ("cpu", "cuda"))
    assert (cpu.enforce_eager, cpu.dtype) == (True, "float32")
    assert (cuda.enforce_eager, cuda.dtype) == (False, "auto")
    assert runs({"model": str(model), "enforce_eager": True}, "cuda")[0].resource.enforce_eager
    forced = runs({"model": str(model), "protocol": "decode"}, "cuda")[0]
    assert forced.resource.protocol == "decode"
    with pytest.raises(UsageError, match="only CUDA has; use --protocol chunked"):
        runs({"model": str(model), "protocol": "decode"}, "cpu")


def test_what_varies_gets_folders_and_shares_engines_where_it_can(model, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    texts = [f"text:{tmp_path}/a.txt", f"text:{tmp_path}/b.txt"]
    made = points({"model": str(model), "dataset": texts, "vary": {"prefill_chunk": [32, 64]}})
    assert [str(point.folder) for point in made] == [
        f"out/dataset=text-{name}/prefill-chunk={chunk}"
        for name in ("a.txt", "b.txt")
        for chunk in (32, 64)
    ]
    engines = [point.runs[0].resource for point in made]
    assert engines[0] == engines[2] != engines[1] == engines[3]
    assert str(tmp_path) not in str(Study.parse({"dataset": texts}).to_dict())


def test_several_texts_and_their_throughput_passes_share_one_engine(model, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    full = read_study(next(path for path in STUDIES if path.stem == "full_evaluation"))
    texts = [f"text:{tmp_path}/a.txt", f"text:{tmp_path}/b.txt"]
    made = points({**full, "model": str(model), "dataset": texts}, "cuda")
    assert len({str(run.resource) for point in made for run in point.runs}) == 1
    assert [sum(r.kind == "throughput" for r in point.runs) for point in made] == [39, 39]
    assert made[0].runs[0].resource.eviction["score_query_stride"] == 1


def test_throughput_is_a_pass_of_its_own(model):
    made = runs(
        {
            "model": str(model),
            "methods": ["h2o"],
            "sparsity": [0.5],
            "num_runs": 3,
            "throughput": True,
            "load_runs": 1,
            "max_num_seqs": 16,
        }
    )
    assert [run.kind for run in made] == ["perplexity"] * 3 + ["throughput"]
    load = made[-1].measurement.load
    assert (load.num_requests, load.prompt_tokens, load.output_tokens) == (32, 896, 128)
    assert made[-1].file_name == "h2o_s0.5_ctx1024_load0.json"
    assert made[-1].resource == made[0].resource


def test_a_lone_window_still_gets_an_engine_for_two(model):
    engine = runs({"model": str(model), "max_num_seqs": 1})[0].resource
    assert (engine.max_num_seqs, engine.kv_pool_windows) == (2, 2)
    assert engine.max_num_batched_tokens == 128


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"prefil_chunk": 64}, "did you mean 'prefill_chunk'"),
        ({"num_samples": 0}, "--num-samples must be at least 1"),
        ({"num_samples": "8"}, "--num-samples must be at least 1"),
        ({"num_runs": 2**70}, "give 1 to 10,000"),
        ({"min_context": 1024}, "leaves no token"),
        ({"document_mode": "split"}, "concatenate, whole"),
        ({"protocol": "greedy"}, "chunked, decode"),
        ({"dtype": "int8"}, "float32"),
        ({"vary": {"name": ["a"]}}, "no setting that can vary"),
        ({"vary": {"prefill_chunk": 64}}, "list of values"),
        ({"vary": {"prefill_chunk": [64, 64]}}, "same value twice"),
        ({"vary": ["prefill_chunk"]}, "must be a mapping"),
        ({"methods": []}, "nothing to run"),
        ({"methods": [{"name": "x"}]}, "give a policy's name or"),
        ({"methods": [{"policy": "cab", "arguments": {}}]}, "name, args and granularity"),
        ({"methods": [{"policy": "cab", "name": "a/b"}]}, "use letters"),
        (
            {"methods": ["cab", {"policy": "cab", "name": "cab", "args": {"local": 0.3}}]},
            "same name",
        ),
        ({"throughput": True, "load_output_tokens": 1024}, "leaves no prompt"),
        ({"num_runs": 2, "seeds": [1]}, "drop one"),
        ({"dataset": [None]}, "dataset is None; give a name"),
        ({"dataset": ""}, "dataset is ''; give a name"),
        ({"dataset": "text:/nowhere.txt"}, "cannot read /nowhere.txt"),
    ],
)
def test_refusals(model, settings, sentence):
    with pytest.raises(UsageError, match=r"^[^\n]+$") as refusal:
        points({"model": str(model), **settings})
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"methods": ["h20"]}, "unknown policy"),
        ({"sparsity": ["1.0"]}, "sparsity is '1.0'"),
        ({"methods": [{"policy": "cab", "args": {"lokal": 1}}]}, "lokal"),
        ({"methods": ["h2o"], "sparsity": [], "budget_tokens": [10]}, "give at least 64"),
    ],
)
def test_what_the_plugin_refuses(model, settings, sentence):
    with pytest.raises(EvictionConfigError, match=sentence):
        points({"model": str(model), **settings})


def test_study_files(tmp_path):
    with pytest.raises(UsageError, match="cannot read the study"):
        read_study(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(UsageError, match="is no study"):
        read_study(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    with pytest.raises(UsageError, match="cannot read the study"):
        read_study(tmp_path / "broken.yaml")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_that_come_with_the_project(path, model):
    settings = {**read_study(path), "model": str(model)}
    made = points(settings, "cuda" if settings.get("protocol") == "decode" else "cpu")
    assert sum(len(point.runs) for point in made) >= 3


def test_records_are_in_the_same_order_whenever_they_were_made():
    def record(method, sparsity, seed):
        return {"method": method, "sparsity": sparsity, "seed": seed, "budget_tokens": None}

    wanted = [
        ("dense", 0.0, 0),
        ("h2o", 0.5, 0),
        ("h2o", 0.5, 1),
        ("h2o", 0.9, 0),
        ("cab", 0.5, 0),
        ("cab-forman", 0.5, 0),
    ]
    wanted = [record(*values) for values in wanted]
    assert sorted(reversed(wanted), key=order) == wanted
