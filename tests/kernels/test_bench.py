"""The kernels' benchmark, but for its clock and FlashAttention: in Triton's interpreter."""

import pytest
import torch

from harness.bench import kernels, mass_kernels, pack_kernels
from harness.bench.kernel_tables import kernels_table
from harness.records.files import read_json

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
SHAPE = {"heads": 4, "kv_heads": 2, "head_size": 16, "layers": 2}
BANDWIDTH = 1e12


class WithoutFlashAttention(mass_kernels.MassCase):
    def attend(self):
        # Triton's interpreter multiplies no bfloat16.
        self.cache, self.query = self.cache.float(), self.query.float()
        return torch.zeros(self.heads, sum(queries for queries, _ in self.rows))


def run_once(function, prepare=lambda: None):
    prepare()
    function()
    return 0.5


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize(
    ("rows", "window", "every", "by_chance"),
    [
        ([(1, 40)] * 2, None, 1, False),
        ([(20, 40), (16, 16)], 8, 1, False),
        ([(1, 40)] * 5, None, 2, False),
        ([(1, 40)] * 5, None, 2, True),
    ],
)
def test_mass(rows, window, every, by_chance, by_token):
    case = WithoutFlashAttention(SHAPE, rows, 16, every, by_chance, "cpu")
    ms = run_once(lambda: case.score(by_token, window=window))
    made = case.token_mass if by_token else case.mass
    assert (made.flatten(1) if by_token else made[:, None]).any(1).sum() == sum(
        -(-length // 16) for _, length in rows[::every]
    )
    entry = mass_kernels.mass_entry(case, by_token, window, ms, 0.25, BANDWIDTH)
    rows = rows[::every]
    tokens = sum(length for _, length in rows)
    assert entry["key_bytes"] == tokens * 2 * 16 * 2
    assert entry["score_bytes"] == (tokens * 2 * 16 if by_token else 0)
    seen = sum(
        place + 1
        for queries, length in rows
        for place in range(length - min(queries, window or queries), length)
    )
    assert entry["flops"] == 2 * 4 * 16 * seen
    assert entry["ratio_to_attention"] == 2.0


@pytest.mark.parametrize("policy", pack_kernels.POLICIES)
def test_packing(policy):
    packs = pack_kernels.Packs(
        requests=2, region=48, leaving=32, budget=64, processed=200, held=400
    )
    case = pack_kernels.PackCase(SHAPE, packs, policy, 16, "cpu")
    before = {name: array.clone() for name, array in case.scores.arrays().items()}
    runs = []

    def timer(function, prepare):
        run_once(function, prepare)
        runs.append(not torch.equal(before["mass"], case.scores.mass))
        return 0.5

    entry = case.entry(timer, BANDWIDTH)
    assert runs == [False, True, True], "choosing changes nothing, moving does, and again"
    case.restore()
    for name, array in case.scores.arrays().items():
        assert torch.equal(array, before[name])
    heads = 2 * 2 * 2
    assert heads * 8 < entry["moves"] <= heads * 32
    assert entry["move_bytes"] == 2 * entry["moves"] * (2 * 16 * 2 + 12)
    read = {"h2o": 8, "cab": 8 + 32, "cab, bridges by peaks": 12, "keydiff": 4 + 32}[policy]
    assert entry["choose_bytes"] == heads * 80 * read
    assert entry["both_share_of_copy_bandwidth"] == pytest.approx(
        entry["both_bytes"] / 0.5e-3 / BANDWIDTH
    )


def test_the_record_and_its_tables(monkeypatch, tmp_path):
    monkeypatch.setitem(kernels.SHAPES, "small", SHAPE)
    batches = {"decode 2 x 40": [(1, 40)] * 2, "chunk 20 of 40": [(20, 40)]}
    monkeypatch.setattr(mass_kernels, "BATCHES", batches)
    packs = {"2 at once": pack_kernels.Packs(2, 48, 32, 64, 200, 400)}
    monkeypatch.setattr(pack_kernels, "PACKS", packs)
    monkeypatch.setattr(mass_kernels, "MassCase", lambda *a: WithoutFlashAttention(*a, "cpu"))
    on_cpu = pack_kernels.PackCase
    monkeypatch.setattr(pack_kernels, "PackCase", lambda *a: on_cpu(*a, "cpu"))
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda: BANDWIDTH)
    monkeypatch.setattr(kernels, "median_ms", run_once)
    monkeypatch.setattr(kernels, "median_ms_prepared", run_once)
    monkeypatch.setattr(kernels, "provenance", lambda modules, device: {})
    output = tmp_path / "kernels.json"
    monkeypatch.setattr("sys.argv", ["kernels", "--shapes", "small", "--output", str(output)])
    kernels.main()
    record = read_json(output)
    scoring, _, packing = kernels_table(record).split("\n\n")
    assert [row.count("|") for row in scoring.splitlines()] == [9] * (2 + 2 + 4)
    assert "| decode 2 x 40, by token | all | 500 | 500 | 1.00 | 0% | - | - |" in scoring
    assert "| chunk 20 of 40, by token | last 32 | 500 | 500 | 1.00 | - | 0 | 0 |" in scoring
    rows = 2 + len(pack_kernels.POLICIES)
    assert [row.count("|") for row in packing.splitlines()] == [7] * rows
    del record["packing"]
    assert kernels_table(record) == scoring, "as older records are"
