"""What ``kv-eviction offline`` refuses before an engine starts: one sentence, exit status 2."""

import json
import re

import pytest

from harness.cli import main


@pytest.fixture
def refused(smollm2, tmp_path, capsys, monkeypatch):
    """Runs the command, which must refuse; returns its sentence. Nothing may be left behind."""
    monkeypatch.setattr("harness.sweep.offline.running", None)  # no engine is ever started
    text = tmp_path / "text.txt"
    text.write_text("word " * 30_000)
    runs = tmp_path / "runs"

    def command(*flags, dataset=f"text:{text}"):
        arguments = ["offline", "--dataset", dataset, "--output-dir", str(runs), *flags]
        assert main(arguments) == 2
        told = capsys.readouterr().err.strip()
        error = told.splitlines()[-1]  # Transformers may log before it
        assert error.startswith("kv-eviction: ")
        assert told.count("kv-eviction: ") == 1
        assert not runs.exists()
        return error

    return command


def nothing_evicted(sentence):
    """The remedies that a refusal names, as flags and values."""
    assert "would evict nothing from a window" in sentence
    return re.findall(r"(--[a-z-]+) ([\d.]+)", sentence.split("; give ")[1])


NO_SLACK = ["--slack-tokens", "0"]


@pytest.mark.parametrize(
    ("flags", "remedies"),
    [
        (["--context-length", "128"], {"--context-length"}),
        (
            [
                "--context-length",
                "128",
                "--prefill-chunk",
                "32",
                "--sparsity",
                "0.9",
                "--slack-tokens",
                "0",
            ],
            {"--context-length", "--min-blocks"},
        ),
        (["--prefill-chunk", "1024"], {"--context-length", "--prefill-chunk"}),
        (["--sparsity", "0.01"], {"--context-length", "--sparsity"}),
        (["--budget-tokens", "1024"], {"--context-length", "--budget-tokens"}),
        (
            ["--sparsity", "0.1"],
            {"--context-length", "--sparsity", "--slack-tokens", "--prefill-chunk"},
        ),
        (
            [
                "--block-size",
                "128",
                "--context-length",
                "512",
                "--sparsity",
                "0.9",
                "--slack-tokens",
                "0",
            ],
            {"--context-length", "--min-blocks", "--block-size"},
        ),
    ],
)
def test_a_run_that_would_evict_nothing(refused, flags, remedies, monkeypatch):
    found = nothing_evicted(refused(*flags))
    assert {flag for flag, _ in found} == remedies

    class Planned(Exception):
        pass

    def stop(*_):
        raise Planned

    # Each remedy, by itself, leads on to the runs; text and engine do not matter here.
    monkeypatch.setattr("harness.sweep.loop.missing", stop)
    for flag, value in found:
        changed = [*flags, flag, value]
        if "--budget-tokens" in flags:
            changed += ["--methods", "h2o", "--sparsity", "0.5"]
        with pytest.raises(Planned):
            main(["offline", *changed])


def test_a_run_that_no_single_flag_would_make_evict(refused):
    sentence = refused("--context-length", "128", "--sparsity", "0.001")
    assert sentence.endswith("give a longer --context-length and a higher --sparsity")


def test_evicting_nothing_is_fine_where_nothing_else_was_asked(refused, monkeypatch):
    # Dense alone, and sparsity 0, go on to the next check.
    short = ("--context-length", "128", "--num-samples", "99999")
    assert "need" in refused(*short, "--methods", "dense")
    assert "need" in refused(*short, "--methods", "h2o", "--sparsity", "0")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--kv-cache-dtype", "fp8"],
            "kv_cache_dtype is fp8, which eviction reads on CUDA only; use kv_cache_dtype=",
        ),
        (
            ["--context-length", "33"],
            "--prefill-chunk 64 is longer than a window of --context-length 33",
        ),
        (
            ["--context-length", "16", "--prefill-chunk", "16"],
            "--block-size 32 is longer than a window of --context-length 16",
        ),
        (
            ["--context-length", "8193"],
            "--context-length 8193 is more than smollm2-135m can read; give at most 8192",
        ),
    ],
)
def test_lengths_are_told_as_the_flags_that_were_given(refused, flags, sentence):
    assert sentence in refused("--methods", "dense", *flags)


def test_the_models_whole_length_can_be_used(refused):
    # It goes on to the text, which is too short for so many windows.
    assert "30,001 tokens, but 8 windows of 8,192 need" in refused("--context-length", "8192")


def test_what_vllm_finds_wrong_is_told_without_its_wrapping(refused, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    error = refused("--model", str(folder))
    assert "vLLM refuses model: " in error
    for wrapping in ("validation error", "Value error", "pydantic"):
        assert wrapping not in error


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_model_folder_with_a_damaged_configuration(refused, tmp_path, content):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(content)
    assert f"cannot read {folder}/config.json" in refused("--model", str(folder))


@pytest.mark.parametrize(
    "name", ["../../x", "/tmp/x", "a/b", "a\\b", "", " ", ".", "..", "a\0b", "a\nb", "x" * 300]
)
def test_a_name_that_is_no_plain_folder(refused, tmp_path, name):
    assert "--experiment-name is " in refused("--experiment-name", name)
    study = tmp_path / "study.yaml"
    study.write_text(json.dumps({"name": name}))
    sentence = refused("--study", str(study))
    assert "name is " in sentence
    assert "give the plain name of a folder" in sentence


def test_a_studys_name_is_text(refused, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text("name: 2024")
    assert "name is 2024; give the plain name" in refused("--study", str(study))


@pytest.mark.parametrize("content", ["", " \n\t \n" * 9000, "\n"])
def test_a_text_of_white_space_alone(refused, tmp_path, content):
    (tmp_path / "blank.txt").write_text(content)
    error = refused(dataset=f"text:{tmp_path}/blank.txt")
    assert "text:blank.txt holds no text but white space; give another text" in error


def test_a_text_shorter_than_a_window(refused, tmp_path):
    (tmp_path / "short.txt").write_text("word " * 100)
    error = refused(dataset=f"text:{tmp_path}/short.txt")
    assert re.search(r"the text has 10\d tokens, fewer than one window of 1,024", error)
    assert "--num-samples" not in error


@pytest.mark.parametrize(
    ("value", "kind"), [(3, "int 3"), (["a"], r"list \['a'\]"), ({"a": 1}, "dict"), (True, "bool")]
)
def test_a_row_that_is_no_text(refused, tmp_path, value, kind):
    rows = [{"text": "words", "body": "more"}, {"text": value, "body": "more"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    error = refused(dataset=f"jsonl:{path}")
    assert re.search(rf"row \d of {path} holds {kind}", error)
    assert "--text-column: text, body" in error


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": null}\n{"text": "  "}'])
def test_rows_without_any_text(refused, tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    refused(dataset=f"jsonl:{path}")


@pytest.mark.parametrize("flags", [["--score-every", "1"], ["--score-every"]])
def test_a_flag_under_its_former_name(refused, flags):
    assert "score_every is now called score_query_stride (--score-query-s" in refused(*flags)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"score_layers": 4}, "score_layers is now called score_layer_stride"),
        ({"vary": {"score_every": [1, 8]}}, "score_every is now called score_query_stride"),
        ({"context_length": None}, "context_length of a study is empty; give a value or remove"),
        ({"tasks": None}, "tasks of a study is empty; give a value or remove the line"),
        ({"hypotheses": None}, "hypotheses of a study is empty; give a value or remove the line"),
        ({"policy_args": {"h2o": None}}, "policy_args of h2o is None; give a mapping"),
        ({"enforce_eager": "false"}, "enforce_eager must be true or false, not 'false'"),
        ({"model": ["a"]}, "model is ['a']; give a name"),
        ({"dataset": ["a", "b"], "vary": ["seeds"]}, "vary must be a mapping"),
        ({"methods": [{}]}, "a method is {}; give a policy's name or"),
        ({"seeds": ["a"]}, "--seeds must be different whole numbers"),
        ({"budget_tokens": ["256"]}, "--budget-tokens is '256'"),
        ({"methods": ["stock"]}, "measure stock with kv-eviction bench or serve-sweep"),
        ({"methods": [{"policy": "cab", "args": [1]}]}, "args of a method are [1]"),
        ({"methods": [{"policy": "cab", "name": "x" * 300}]}, "at most 100"),
    ],
)
def test_settings_of_a_study_of_another_type(refused, tmp_path, settings, sentence):
    study = tmp_path / "study.yaml"
    study.write_text(json.dumps(settings))
    assert sentence in refused("--study", str(study))
