"""Files are written whole or not at all, whoever writes them."""

import os
import subprocess
import zipfile
from hashlib import sha256

import pytest

from harness.bench import decisions, kernels, scheduling
from harness.cli import main
from harness.errors import UnreadableFile, UnwritableFile, UsageError
from harness.inputs import models, packages
from harness.records.common_fields import in_each, stored_once
from harness.records.files import read_json, replacing, write_json, write_text


def on_a_full_disk(path):
    path.with_name(f".{path.name}.{os.getpid()}").symlink_to("/dev/full")
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(UnwritableFile, match=f"cannot write to {path}: No space left on device"):
        write_json(on_a_full_disk(path), {"new": 2})
    assert read_json(path) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


def test_a_block_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    write_text(path, "old")

    def fail():
        with replacing(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"a": NaN}', b'{"a": [1, -Infinity]}', b"\xff\xfe{}", b"[1] [2]"]
)
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UnreadableFile, match=rf"^{path} is damaged \([^\n]+\); delete it"):
        read_json(path)


def test_a_model_that_cannot_be_prepared_leaves_nothing_half(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KV_EVICTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SMOLLM2_GGUF", __file__)

    def convert(gguf, folder):
        (folder / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "_convert", convert)
    assert main(["model", "smollm2-135m"]) == 2
    error = capsys.readouterr().err
    assert "No space left on device; make room there" in error
    assert error.count("\n") == 1
    assert names(tmp_path / "cache") == []


def test_a_download_that_cannot_be_kept_leaves_nothing_half(tmp_path, monkeypatch):
    def pip(command, **options):
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/made_up-1.whl", "w") as wheel:
            wheel.writestr("made_up/text.txt", "words")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", pip)
    wanted = ("made-up==1", "text.txt", sha256(b"words").hexdigest())
    full = on_a_full_disk(tmp_path / "full.txt")
    with pytest.raises(UsageError, match=r"cannot write to .*full\.txt: No space left"):
        packages.fetch_member(*wanted, full)
    assert names(tmp_path) == []
    assert packages.fetch_member(*wanted, tmp_path / "there.txt").read_text() == "words"


@pytest.mark.parametrize("benchmark", [decisions, kernels, scheduling])
def test_a_benchmark_finds_out_first_that_it_cannot_write(benchmark, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["benchmark", "--output", str(tmp_path / "file" / "a.json")])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 2
    assert f"cannot write to {tmp_path}/file/a.json: " in capsys.readouterr().err


def test_what_all_windows_share_is_stored_once():
    windows = [
        {"start": n, "size": 9, "eviction": {"policy": "h2o", "decisions": n}} for n in range(3)
    ]
    timed = [{**w, "eviction": {**w["eviction"], "decision_seconds": 0.1}} for w in windows]
    stored = stored_once(timed)
    assert stored["every_window"] == {"size": 9, "eviction": {"policy": "h2o"}}
    assert stored["windows"][2] == {"start": 2, "eviction": {"decisions": 2}}
    read = in_each({"key": "a", **stored, **stored_once(timed, "samples")})
    assert read == {"key": "a", "windows": windows, "samples": windows}
    assert in_each({"key": "a", **stored_once(windows[:1])})["windows"] == windows[:1]
    assert in_each({"windows": windows}) == {"windows": windows}
