"""Settings of ``--config FILE`` mean to ``kv-eviction serve`` what they mean as flags."""

import pytest

from harness.resources.passthrough import Passthrough

from .test_serve_flags import LLAMA, model, printed, refused, value

BASE = ("--policy", "cab", "--sparsity", "0.9")


@pytest.fixture
def serve(tmp_path, capsys):
    """The command and the notes of a server with a file of these settings."""
    folder = model(tmp_path, LLAMA)

    def print_command(settings, *flags):
        file = tmp_path / "server.yaml"
        file.write_text(settings)
        return printed(capsys, folder, *BASE, "--config", str(file), *flags)

    return print_command


def processors(command):
    start = command.index("--logits-processors") + 1
    ours, *others = command[start : command.index("--block-size")]
    assert ours.startswith("vllm_plugins.refusals.requests:RequestValidator")
    return others


@pytest.mark.parametrize(
    ("settings", "flags", "size"),
    [
        ("block-size: 64", [], "64"),
        ("block_size: 64", [], "64"),
        ("block-size: 64", ["--block-size", "96"], "96"),
        ("block-size: 64", ["--block-size", "32"], "32"),
        ("block-size: 64", ["--block_size=96"], "96"),
        ("port: 8001", [], "32"),
        ("port: 8001", ["--block_size", "64"], "64"),
    ],
)
def test_the_block_size_may_stand_in_the_file(settings, flags, size, serve):
    command, told = serve(settings, *flags)
    assert value(command, "--block-size") == size
    assert not any("block_size" in word for word in command if word.startswith("--"))
    assert f"blocks of {size}" in told


@pytest.mark.parametrize(
    ("settings", "flags", "shared"),
    [
        ("port: 8001", [], True),
        ("no-enable-prefix-caching: true", [], False),
        ("no_enable_prefix_caching: true", [], False),
        ("no-enable-prefix: true", [], False),
        ("enable-prefix-caching: false", [], False),
        ("enable-prefix-caching: true", [], True),
        ("enable_prefix_caching: true", [], True),
        ("no-enable-prefix-caching: false", [], True),
        ("no-enable-prefix-caching: true", ["--enable-prefix-caching"], True),
        ("enable-prefix-caching: true", ["--no-enable-prefix-caching"], False),
        ("port: 8001", ["--no_enable_prefix_caching"], False),
    ],
)
def test_prefix_caching_may_stand_in_the_file(settings, flags, shared, serve):
    command, told = serve(settings, *flags)
    (said,) = [word for word in command if word.startswith("--") and "prefix" in word]
    assert said == ("--enable-prefix-caching" if shared else "--no-enable-prefix-caching")
    assert ("prefix caching is off" in told) != shared


@pytest.mark.parametrize(
    ("settings", "flags", "others"),
    [
        ("logits-processors: [a.b:C, d.e:F]", [], ["a.b:C", "d.e:F"]),
        ("logits_processors: a.b:C", [], ["a.b:C"]),
        ("logits-proc: [a.b:C]", [], ["a.b:C"]),
        ("logits-processors: []", [], []),
        ("logits-processors: [a.b:C]", ["--logits-processors", "g.h:I"], ["g.h:I"]),
        ("port: 8001", ["--logits-proc", "g.h:I"], ["g.h:I"]),
    ],
)
def test_logits_processors_may_stand_in_the_file(settings, flags, others, serve):
    command, _ = serve(settings, *flags)
    assert processors(command) == others
    assert not [word for word in command if word.startswith("--logits")][1:]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("policy: h2o", "--config sets policy, which only the command line can"),
        ("sparsity: 0.5", "drop it from the file and give --sparsity"),
        ("granularity: block", "and give --granularity"),
        ("request_policies: [h2o]", "sets request_policies, which only the command line can"),
        ("request-policies: []", "and give --request-policies"),
        ("score_chunk: 64", "and give --score-chunk"),
        ("print-command: false", "and give --print-command"),
        ("polcy: h2o", "unknown flag --polcy; did you mean --policy?"),
        ("block-s: 64", "unknown flag --block-s; did you mean --block-size?"),
        ("block-size: many", "block-size in --config is 'many'; give a whole number of at least 1"),
        ("block-size: 0", "block-size in --config is 0; give a whole number of at least 1"),
        ("enable_prefix_caching: false", "write enable-prefix-caching: false"),
    ],
)
def test_what_the_file_cannot_set_is_refused(settings, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr("harness.commands.serve.resolve_model")  # the first of what may be slow
    file = tmp_path / "server.yaml"
    file.write_text(settings)
    assert sentence in refused(tmp_path, capsys, "--config", str(file))


def test_two_files_are_refused(tmp_path, capsys):
    file = tmp_path / "server.yaml"
    file.write_text("port: 8001")
    for flags in (["--config", str(file)] * 2, [f"--config={file}"] * 2):
        assert "--config is given more than once" in refused(tmp_path, capsys, *flags)


@pytest.mark.parametrize(
    ("settings", "flags", "sentence"),
    [
        ("port: 8001", ["--no-enable-chunked-prefill"], "--no-enable-chunked-prefill rules out"),
        ("port: 8001", ["--no_enable_chunked_prefill"], "--no-enable-chunked-prefill rules out"),
        ("no-enable-chunked-prefill: true", [], "--no-enable-chunked-prefill rules out"),
        ("enable-chunked-prefill: false", [], "--no-enable-chunked-prefill rules out"),
        ("max_num_seqs: 4", [], "--score-chunk sets --max-num-seqs itself"),
    ],
)
def test_a_score_chunk_needs_chunks(settings, flags, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr("harness.commands.serve.resolve_model")
    file = tmp_path / "server.yaml"
    file.write_text(settings)
    told = refused(tmp_path, capsys, "--score-chunk", "64", "--config", str(file), *flags)
    assert sentence in told


def test_a_flag_wins_over_the_file_for_a_score_chunk_too(serve):
    flags = ("--score-chunk", "64", "--enable-chunked-prefill")
    command, _ = serve("no-enable-chunked-prefill: true", *flags)
    assert value(command, "--max-num-batched-tokens") == "64"


def test_a_file_is_handed_on_as_vllm_takes_it(tmp_path):
    """vLLM would not read the one of ``--config=FILE``."""
    file = tmp_path / "server.yaml"
    file.write_text("port: 8001\n")
    flags = Passthrough([f"--config={file}", "--seed", "1"])
    assert flags.get("--port") == "8001"
    assert flags.flags == ["--config", str(file), "--seed", "1"]


def test_a_file_is_read_by_vllms_rules(tmp_path):
    """All but ``--no-x`` for what is off: that depends on which flags vLLM has."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    file = tmp_path / "server.yaml"
    file.write_text(
        "port: 8001\nserved-model-name: [a, b]\nmiddleware: []\ntrust_remote_code: true\n"
        "hf-overrides: {rope: {factor: 2}}\nno_such_thing: false\nseed: -1\n"
    )
    theirs = FlexibleArgumentParser().load_config_file(str(file))
    assert Passthrough(["--config", str(file)])._of_file == theirs
