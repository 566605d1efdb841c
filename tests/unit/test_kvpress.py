"""The study beside kvpress: windows that leave, records that come back, one page of both."""

import importlib
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from harness.analysis.perplexity import by_chunk
from harness.cli import main
from harness.errors import UsageError
from harness.inputs.windows import tokens_sha256
from harness.records.files import read_json, write_json
from harness.study.settings import Study
from harness.sweep.exported import exported_windows

from .made_up_engine import SETTINGS, made_up_engines, made_up_text, run
from .records import record

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "scripts" / "kvpress"
PROMPT, LENGTH = 128, 256
HASH = "0123456789abcdef" * 4


@pytest.fixture
def scripts(monkeypatch):
    """``compare``, ``sides`` and ``files`` of scripts/kvpress."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return [importlib.import_module(name) for name in ("compare", "sides", "files")]


@pytest.fixture
def settings(smollm2, tmp_path):
    with made_up_engines():
        yield {**SETTINGS, "dataset": made_up_text(tmp_path), "min_context": 129}


def test_exported_windows_are_those_that_are_scored(settings, tmp_path):
    exported = exported_windows(Study.parse(settings))
    assert (exported["min_context"], exported["context_length"]) == (129, 256)
    assert [made["seed"] for made in exported["runs"]] == [0, 1]
    run(settings, tmp_path / "e")
    for made in exported["runs"]:
        scored = read_json(tmp_path / "e" / f"h2o_s0.5_ctx256_seed{made['seed']}.json")
        assert [w["start"] for w in made["windows"]] == [w["start"] for w in scored["windows"]]
        assert made["tokens_sha256"] == scored["tokens_sha256"]
        # The made-up engine's loss is a function of the tokens alone.
        dense = read_json(tmp_path / "e" / f"dense_s0.0_ctx256_seed{made['seed']}.json")
        for window, entry in zip(made["windows"], dense["windows"], strict=True):
            values = -np.random.default_rng(window["tokens"]).random(255)
            expected = by_chunk(values.tolist(), 64, 129)["log_likelihoods"]
            assert entry["log_likelihoods"] == expected


def test_the_command_exports_and_measures_nothing(settings, tmp_path, scripts, capsys):
    study = tmp_path / "study.yaml"
    study.write_text(json.dumps({**settings, "vary": {"prefill_chunk": [64, 32]}}))
    file = tmp_path / "made" / "windows.json"
    assert main(["offline", "--study", str(study), "--export-windows", str(file)]) == 0
    assert "12 windows of 256 tokens" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "study.yaml", "words.txt"]
    exported = scripts[2].read_windows(file)
    assert exported == exported_windows(Study.parse(settings))
    exported["runs"][1]["windows"][0]["tokens"][3] += 1
    write_json(file, exported)
    with pytest.raises(scripts[2].Refused, match=r"seed 1 has other tokens"):
        scripts[2].read_windows(file)


def test_a_study_of_several_kinds_of_windows_is_refused(settings):
    with pytest.raises(UsageError, match="one point at a time"):
        exported_windows(Study.parse({**settings, "vary": {"context_length": [256, 320]}}))


def test_a_study_of_tasks_has_no_windows_to_export(settings):
    with pytest.raises(UsageError, match="measures none; add --perplexity"):
        exported_windows(Study.parse({**settings, "throughput": False, "tasks": ["niah_single"]}))


def test_the_hash_is_that_of_plain_json():
    assert tokens_sha256([[1, 2], [3, 4]]) == (
        # printf '[[1,2],[3,4]]' | sha256sum
        "03a4cc702aa6e4f169ff34dd055714141eae3d2d7c50f6f053150cc72ef12638"
    )


def test_the_study_decides_once_in_its_first_point(smollm2, tmp_path):
    """What README.md of the folder says of the protocol is what study.yaml asks for."""
    study = Study.parse({**_yaml(FOLDER / "study.yaml"), "dataset": made_up_text(tmp_path)})
    prompt, *others = study.vary["prefill_chunk"]
    assert study.min_context == prompt + 1
    assert study.context_length == 2 * prompt
    assert all(prompt % chunk == 0 for chunk in others)
    assert study.slack_tokens == 0
    assert all(budget % study.block_size == 0 for budget in study.budget_tokens)


def _yaml(path):
    import yaml

    return yaml.safe_load(path.read_text())


def _windows(shift, chunk):
    """Five windows of 255 predictions, those behind the prompt ``shift`` nats worse."""
    made = []
    for start in range(0, 5 * LENGTH, LENGTH):
        values = -np.random.default_rng(start).random(LENGTH - 1) - 2.0 - shift
        made.append({"start": start, **by_chunk(values.tolist(), chunk, PROMPT + 1)})
    return made


def _theirs(method, ratio, shift):
    return {
        "schema_version": 1,
        "kind": "kvpress",
        "method": method,
        "compression_ratio": ratio,
        "seed": 0,
        "model": "m",
        "text": {"dataset": "text:made-up.txt"},
        "context_length": LENGTH,
        "min_context": PROMPT + 1,
        "tokens_sha256": HASH,
        "dtype": "float32",
        "timestamp": "2026-01-02T03:04:05+00:00",
        "versions": {"kvpress": "0.5.5", "transformers": "5.2.0", "torch": "2.13.0"},
        "hardware": {"cpu": "made up", "cores": 2},
        "commit": "0123456789ab",
        "code": "0123456789abcdef",
        "kept_tokens": round(PROMPT * (1 - ratio)),
        "windows": _windows(shift, 64),
    }


def _ours(method, policy, budget, shift, chunk):
    made = record(policy, 0.0, 0, 0.0, None)
    made["key"] = f"{method}_s0.0" if budget is None else f"{method}_b{budget}"
    made |= {"method": method, "budget_tokens": budget, "commit": "0123456789ab"}
    made |= {"tokens_sha256": HASH, "windows": _windows(shift, chunk)}
    made["specification"]["min_context"] = PROMPT + 1
    made["specification"]["engine"] |= {"prefill_chunk": chunk, "context_length": LENGTH}
    return made


@pytest.fixture
def folder(tmp_path):
    """Records of both sides: kvpress's SnapKV 0.1 nats worse than dense, ours 0.3, and 0.4 in
    chunks of 64."""
    for method, ratio, shift in (("dense", 0.0, 0.0), ("snapkv-32", 0.5, 0.1), ("snapkv", 0.5, 0)):
        path = tmp_path / "theirs" / f"{method}_c{ratio:g}_seed0.json"
        write_json(path, _theirs(method, ratio, shift))
    points = []
    for chunk, shift in ((PROMPT, 0.3), (64, 0.4)):
        point = tmp_path / "ours" / f"prefill-chunk={chunk}"
        points.append({"varied": {"prefill_chunk": chunk}, "folder": point.name, "keys": []})
        for made in (
            _ours("dense", "dense", None, 0.0, chunk),
            _ours("snapkv", "snapkv", 64, shift, chunk),
            _ours("cab", "cab", 64, 0.0, chunk),
        ):
            write_json(point / f"{made['key']}_ctx256_seed0.json", made)
    write_json(tmp_path / "ours" / "experiment.json", {"comparisons": points})
    return tmp_path


def test_the_page_has_both_sides_and_their_difference(folder, scripts):
    compare = scripts[0]
    assert compare.main([str(folder)]) == 0
    page = (folder / "report.md").read_text()
    assert "5 windows of 256 tokens, the same on both sides" in page
    assert f"SHA-256 of the tokens {HASH[:16]}" in page
    assert re.search(r"a difference of [+-]0\.0000( \[.+\])? nats per token", page)
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    once, chunked = ([r for r in rows if "snapkv" in r[i]] for i in (1, 0))
    more = 100 * (math.exp(0.1) - 1)
    (pair,) = [r for r in once if r[0] == "| snapkv-32"]
    assert f"(+{more:.1f}%)" in pair[2]
    assert pair[4].startswith("+0.2000")
    (alone,) = [r for r in rows if r[0] == "| snapkv" and r[1] == "-"]
    assert alone[3:] == ["-", "- |"]
    (pair,) = [r for r in chunked if r[0] == "| snapkv" and r[1] == "snapkv-32"]
    assert [cell[:7] for cell in pair[3:]] == ["+0.1000", "+0.3000", "+0.3000"]
    assert "## A budget of 64 tokens, decided every 64" in page


@pytest.mark.parametrize(
    ("side", "change", "reason"),
    [
        ("theirs", {"tokens_sha256": "0" * 64}, "have read other windows"),
        ("theirs", {"min_context": 100}, "mixes records of different min_context"),
        ("theirs", {"kind": "perplexity"}, "holds no records of kvpress, or others too"),
        ("ours/prefill-chunk=128", {"tokens_sha256": None}, "have read other windows"),
    ],
)
def test_sides_that_do_not_match_are_refused(folder, scripts, capsys, side, change, reason):
    path = sorted((folder / side).glob("*.json"))[-1]
    write_json(path, {**read_json(path), **change})
    assert scripts[0].main([str(folder)]) == 2
    assert reason in capsys.readouterr().err


def test_a_study_that_was_interrupted_has_a_page_of_what_is_there(folder, scripts):
    shutil.rmtree(folder / "ours" / "prefill-chunk=64")
    assert scripts[0].main([str(folder)]) == 0
    page = (folder / "report.md").read_text()
    assert "decided once" in page
    assert "decided every" not in page


def test_a_study_that_never_decides_once_is_refused(folder, scripts, capsys):
    shutil.rmtree(folder / "ours" / "prefill-chunk=128")
    assert scripts[0].main([str(folder)]) == 2
    assert "no point with --prefill-chunk 128" in capsys.readouterr().err
