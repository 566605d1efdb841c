"""Two machines' records of one study, side by side."""

from pathlib import Path
from statistics import fmean

import pytest

from harness.analysis.perplexity import perplexity, total
from harness.bench.readme import fill, main
from harness.bench.scoring_tables import sampled_table
from harness.errors import UsageError
from harness.records.files import write_json
from harness.records.stored import read_record
from harness.report.agreement import agreement_table

from .records import experiment

MARKED = "before\n<!-- agreement: cpu cuda -->\nold\n<!-- end -->\nafter\n"


def shift(record, nats):
    for window in record["windows"]:
        window["log_likelihoods"] = [value - nats for value in window["log_likelihoods"]]


@pytest.fixture
def sides():
    """The same runs on a CPU in float32 and on a GPU in bfloat16, there a little worse."""
    cpu, cuda = experiment(), experiment()
    for record in cpu:
        record["hardware"] = {"device": "cpu", "cpu": "a CPU", "cores": 2}
    for record in cuda:
        record["hardware"] = {
            "device": "cuda",
            "cpu": "a CPU",
            "cores": 16,
            "gpu": "a GPU",
            "driver": "1",
            "cuda": "13",
        }
        record["versions"] = {"vllm": "0.32.0", "torch": "2.11.0"}
        record["engine"]["dtype"] = "bfloat16"
        shift(record, 0.02)
    return {"cpu": cpu, "cuda": cuda}


def write(sides, folder):
    for side, records in sides.items():
        for record in records:
            write_json(folder / side / f"{record['key']}_seed{record['seed']}.json", record)


def test_both_perplexities_and_their_difference_stand_in_the_readme(sides, tmp_path):
    write(sides, tmp_path)
    text = fill(MARKED, tmp_path)
    assert text.startswith("before\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert fill(text, tmp_path) == text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == "| method | sparsity | CPU float32 | CUDA bfloat16 | difference |"
    assert [row.split(" | ")[:2] for row in rows[1:]] == [
        ["| dense", "-"],
        ["| h2o", "0.9"],
        ["| cab", "0.5"],
        ["| cab", "0.9"],
    ]
    dense = [r for r in sides["cpu"] if r["method"] == "dense"]
    expected = fmean(perplexity(map(total, record["windows"])) for record in dense)
    # 0.02 nats on each of 5 sums over 4 predictions.
    assert rows[1] == f"| dense | - | {expected:.3f} | {expected * 1.0050125:.3f} | +0.50% |"
    assert "a GPU" in text
    assert "the same 6 windows" in text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r["windows"][0].update(start=1), "differs .* in starts of windows"),
        (lambda r: r["specification"].update(text={"sha256": "ff"}), "in text"),
        (lambda r: r["specification"]["engine"].update(context_length=9), "in context_length"),
        (lambda r: r["specification"]["engine"].update(prefill_chunk=9), "in prefill_chunk"),
        (lambda r: r["specification"]["engine"].update(block_size=9), "in block_size"),
        (lambda r: r["specification"]["engine"]["eviction"].update(score="decay"), "in score"),
        (lambda r: r.update(seed=7), "of different seeds"),
        (lambda r: r.update(key="h2o_s0.8"), "different methods or sparsities"),
    ],
)
def test_other_windows_or_settings_are_refused(sides, change, sentence):
    for record in sides["cuda"]:
        if (record["method"], record["seed"]) == ("dense", 1):
            change(record)
    with pytest.raises(UsageError, match=sentence):
        agreement_table(sides["cpu"], sides["cuda"])


def test_records_under_former_names_are_read_as_others_are(sides):
    names = {
        "cpu": {"score_query_stride": 8, "score_layer_stride": 4},
        "cuda": {"score_every": 8, "score_layers": 4},
    }
    for side, records in sides.items():
        for record in records:
            engine = record["specification"]["engine"]
            engine["eviction"] = {**engine["eviction"], **names[side]}
    agreement_table(sides["cpu"], sides["cuda"])
    for record in sides["cuda"]:
        record["specification"]["engine"]["eviction"]["score_every"] = 3
    with pytest.raises(UsageError, match=r"in score_query_stride;"):
        agreement_table(sides["cpu"], sides["cuda"])


def test_a_refusal_is_one_sentence_and_leaves_the_readme_alone(
    sides, tmp_path, monkeypatch, capsys
):
    for record in sides["cuda"]:
        record["specification"]["engine"]["block_size"] = 16
    write(sides, tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(MARKED)
    monkeypatch.setattr("sys.argv", ["readme", str(readme), str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert readme.read_text() == MARKED


def test_records_say_under_either_name_how_scores_were_sampled():
    folder = Path(__file__).resolve().parents[2] / "results" / "sampled-scores"
    records = [read_record(path) for path in sorted(folder.rglob("*_seed*.json"))]
    table = sampled_table(records)
    for record in records:
        eviction = record["specification"]["engine"]["eviction"]
        eviction["score_query_stride"] = eviction.pop("score_every")
        eviction["score_layer_stride"] = eviction.pop("score_layers")
    assert sampled_table(records) == table
    assert "| 1 in 8 | 1 in 4 |" in table
