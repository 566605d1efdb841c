"""The kernels that Triton's interpreter runs here compile for a GPU, too; that needs none."""

import json
import os
import subprocess
import sys

import pytest
import torch

SHARED_MEMORY = 227 * 1024
"""Bytes that a program may have on a Hopper GPU."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs them")
def test_every_kernel_compiles_for_a_gpu(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    ended = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_all"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert sorted(found["compiled"]) == found["every"]
    assert max(max(shared) for shared in found["compiled"].values()) <= SHARED_MEMORY
