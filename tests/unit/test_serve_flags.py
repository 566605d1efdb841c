"""``kv-eviction serve`` refuses what undoes eviction before anything slow is imported."""

import json
import shlex
import subprocess
import sys

import pytest

from harness.cli import main
from harness.errors import UsageError
from harness.resources.passthrough import Passthrough
from vllm_plugins.config import EvictionConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "max_position_embeddings": 2048,
}
WINDOWED = {**LLAMA, "model_type": "mistral", "sliding_window": 256}
HYBRID = {**WINDOWED, "layer_types": ["sliding_attention", "full_attention"] * 2}


def model(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def refused(folder, capsys, *flags, config=LLAMA):
    base = ["serve", model(folder, config), "--policy", "cab", "--sparsity", "0.9"]
    assert main([*base, "--print-command", *flags]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("kv-eviction: ")
    return line


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--enable_dbo"], "dual batch overlap"),
        (["--enable-db"], "dual batch overlap"),
        (["--kv-cache-dtype", "fp8"], "kv_cache_dtype is fp8, which eviction reads on CUDA only"),
        (["--kv-cache-dtype", "fp8_e5m2"], "kv_cache_dtype is fp8_e5m2, which is not tested"),
        (["--kv-cache-dtype=int8_per_token_head"], "kv_cache_dtype is int8_per_token_head"),
        (["--kv-transfer-config", "{}"], "drop kv_transfer_config, MultiConnector"),
        (["--kv-transfer-config.kv_connector", "X"], "drop kv_transfer_config"),
        (["--kv-offloading-size", "4"], "kv_offloading_size"),
        (["--speculative-config", "{}"], "speculative decoding is on"),
        (["-pp", "2"], "pipeline parallelism"),
        (["--decode-context-parallel-size=2"], "context parallelism"),
        (["--enable-dbo"], "dual batch overlap"),
        (["--attention-backend", "FLASH_ATTN"], "would replace eviction's own"),
        (["--layer-groups", "2", "--disable-hybrid-kv-cache-manager"], "hybrid KV-cache manager"),
        (["--layer-groups", "3"], "use one of: 1, 2, 4"),
        (["--sparsty", "0.9"], "unknown flag --sparsty; did you mean --sparsity?"),
        (["--polcy=h2o"], "unknown flag --polcy; did you mean --policy?"),
        (["--spars", "0.9"], "unknown flag --spars; did you mean --sparsity?"),
        (["--port"], "--port is ''; give a number from 1 to 65535"),
        (["--port", "99999"], "--port is '99999'; give a number from 1 to 65535"),
        (["--port", "-1"], "--port is '-1'"),
        (["--score-chunk", "0"], "--score-chunk is 0"),
        (["--score-chunk", "64", "--max-num-seqs", "4"], "--score-chunk sets --max-num-seqs"),
        (["--config", "/nowhere.yaml"], "cannot read --config /nowhere.yaml"),
        (["--budget-tokens", "512"], "give sparsity or budget_tokens, not both"),
        (["--score-every", "8"], "score_every is now called score_query_stride"),
        (["--score_layers=4"], "score_layers is now called score_layer_stride"),
    ],
)
def test_a_flag_that_undoes_eviction_is_refused(flags, sentence, tmp_path, capsys):
    assert sentence in refused(tmp_path, capsys, *flags)


def test_the_last_value_of_a_flag_counts():
    flags = Passthrough(["--port=3", "-tp", "2", "--port", "4", "--enforce-eager"])
    assert flags.get("--port") == "4"
    assert flags.get("--enforce-eager") == ""
    assert flags.get("--host") is None


def test_a_configuration_file_is_read_too(tmp_path, capsys):
    file = tmp_path / "server.yaml"
    file.write_text("enable-dbo: true\nport: 8001\n")
    assert "dual batch overlap" in refused(tmp_path, capsys, "--config", str(file))
    file.write_text("enable-dbo: false\nport: 99999\n")
    assert "--port is '99999'" in refused(tmp_path, capsys, "--config", str(file))


@pytest.mark.parametrize(
    ("config", "flags", "sentence"),
    [
        (WINDOWED, [], "set max_model_len to at most their window of 256 tokens"),
        (WINDOWED, ["--max-model-len", "257"], "has a sliding window, so nothing is left to evict"),
        ({"text_config": WINDOWED}, [], "so nothing is left to evict"),
        (
            {**LLAMA, "sliding_window": 256, "layer_types": ["sliding_attention"] * 4},
            [],
            "so nothing",
        ),
        (HYBRID, ["--layer-groups", "4"], "does not divide the model's 2 layers with full"),
        ({**LLAMA, "kv_lora_rank": 32}, [], "latent attention (MLA)"),
    ],
)
def test_a_model_is_refused_by_its_configuration(config, flags, sentence, tmp_path, capsys):
    assert sentence in refused(tmp_path, capsys, *flags, config=config)


def test_a_model_that_nobody_has_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["serve", "nobody/has-it", "--policy", "cab", "--sparsity", "0.9"]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert "nobody/has-it is no folder here and cannot be had from the hub" in output.err


def test_a_policy_without_a_budget_is_refused(tmp_path, capsys):
    folder = model(tmp_path, LLAMA)
    assert main(["serve", folder, "--policy", "cab"]) == 2
    assert "policy cab evicts nothing without a budget" in capsys.readouterr().err


def test_a_refusal_imports_nothing_slow(tmp_path):
    """vLLM alone takes seconds; every check that needs only the command line comes before it."""
    code = (
        "import sys; from harness.cli import main; status = main(sys.argv[1:]);"
        "print(status, {'vllm', 'torch', 'transformers'} & {*sys.modules})"
    )
    for flags, config in ((["--enable-dbo"], LLAMA), ([], WINDOWED)):
        command = ["serve", model(tmp_path, config), "--policy", "cab", "--sparsity", "0.9", *flags]
        done = subprocess.run(
            [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True
        )
        assert done.stdout == "2 set()\n"


def printed(capsys, *arguments):
    assert main(["serve", *arguments, "--print-command"]) == 0
    output = capsys.readouterr()
    return shlex.split(output.out), output.err


def value(command, name):
    return command[command.index(name) + 1]


def test_the_command_names_its_pool_and_says_so(smollm2, capsys):
    command, told = printed(capsys, "smollm2-135m", "--policy", "cab", "--sparsity", "0.9")
    size = int(value(command, "--kv-cache-memory-bytes"))
    assert 2**28 < size < 2**40
    assert f"the KV pool takes {size / 2**30:.1f} GiB" in told
    assert "--kv-cache-memory-bytes" in told
    assert "policy cab, sparsity 0.9, tokens for every head; prefixes are shared up to" in told
    assert "start with --score-chunk 64" in told
    for flag in ("--kv-cache-memory-bytes", "--gpu-memory-utilization"):
        command, told = printed(capsys, "smollm2-135m", flag, "0.5")
        assert "KV pool" not in told
        assert command.count("--kv-cache-memory-bytes") == (flag == "--kv-cache-memory-bytes")


def test_a_score_chunk_is_the_whole_budget_of_one_request(smollm2, capsys):
    command, told = printed(
        capsys, smollm2, "--policy", "cab", "--sparsity", "0.9", "--score-chunk", "64"
    )
    assert value(command, "--max-num-batched-tokens") == "64"
    assert value(command, "--max-num-seqs") == "1"
    assert "--no-async-scheduling" in command
    assert "one request at a time" in told


def test_logits_processors_of_the_user_stand_beside_the_validator(smollm2, capsys):
    command, _ = printed(capsys, smollm2, "--logits-processors", "a.b:C", "d.e:F", "--seed", "1")
    assert command.count("--logits-processors") == 1
    first, second, third, after = command[command.index("--logits-processors") + 1 :][:4]
    assert first.startswith("vllm_plugins.refusals.requests:RequestValidator.")
    assert (second, third) == ("a.b:C", "d.e:F")
    assert after.startswith("--")
    assert value(command, "--seed") == "1"


def test_no_flag_of_vllm_is_taken_for_one_of_ours():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from harness.cli import _parser

    serve = _parser()._subparsers._group_actions[0].choices["serve"]
    own = [flag for action in serve._actions for flag in action.option_strings]
    parser = make_arg_parser(FlexibleArgumentParser())
    theirs = {flag for action in parser._actions for flag in action.option_strings}
    refused = set()
    for flag in theirs:
        try:
            Passthrough([flag, "1"]).check(EvictionConfig(), own)
        except (UsageError, ValueError):
            refused.add(flag)
    assert refused == {
        "--attention-backend",
        "--config",
        "--enable-dbo",
        "--kv-cache-dtype",
        "--kv-offloading-size",
        "--kv-transfer-config",
        "--model",
        "--spec-method",
        "--spec-model",
        "--spec-tokens",
        "--speculative-config",
        "--worker-cls",
        "-sc",
    }
