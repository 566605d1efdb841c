"""Texts: local files of every kind, documents, what is pinned, and the sentences of refusals."""

import json

import pytest

from harness.errors import UsageError
from harness.inputs.corpora import (
    HUB,
    Documents,
    describe,
    load_documents,
    load_text,
    resolved_revision,
    resolved_split,
)
from harness.inputs.text import Text
from harness.inputs.token_bytes import token_bytes
from harness.inputs.tokens import encode, load_tokenizer, scored_text, tokenize
from harness.inputs.windows import draw_prompts, draw_windows

from .records import Characters

ROWS = [{"text": "one", "body": "1"}, {"text": "two", "body": "2"}]


@pytest.fixture
def files(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


def test_the_embedded_text(canterbury):
    assert len(canterbury) > 550_000
    assert "librarian" in canterbury.lower()
    assert "White Rabbit" in canterbury


def test_local_files(files):
    assert load_text(f"text:{files}/a.txt") == "words"
    for name in (f"jsonl:{files}/a.jsonl", f"parquet:{files}/a.parquet", str(files / "corpus")):
        assert load_text(name) == "one\n\ntwo", name
        bodies = load_documents(describe(name, "body", "whole"))
        assert bodies.texts == ["1", "2"], name


def test_a_folder_with_several_splits_and_no_test_is_refused(files):
    folder = files / "corpus"
    (folder / "test.jsonl").rename(folder / "validation.jsonl")
    assert load_text(str(folder)) == "one\n\ntwo", "the only one"
    (folder / "train.jsonl").write_text(json.dumps({"text": "three"}))
    with pytest.raises(UsageError, match="no test split, but train, validation; give text:FILE"):
        load_text(str(folder))


def test_a_local_file_is_known_by_its_content(files):
    before = describe(f"jsonl:{files}/a.jsonl", None, "whole")
    assert (before.dataset, before.column) == ("jsonl:a.jsonl", "text")
    (files / "a.jsonl").write_text(json.dumps({"text": "three"}))
    assert describe(f"jsonl:{files}/a.jsonl", None, "whole") != before


def test_a_folder_is_known_by_its_content_whatever_its_name(files):
    folder = (files / "corpus").rename(files / "pg19")
    before = describe(str(folder), None, "whole")
    assert (before.dataset, before.revision) == ("pg19", None)
    assert load_documents(before).texts == ["one", "two"]
    assert resolved_split(before) == "test"
    (folder / ".note").write_text("hidden")
    assert describe(str(folder), None, "whole") == before
    (folder / "test.jsonl").write_text(json.dumps({"text": "three"}))
    assert describe(str(folder), None, "whole") != before


@pytest.mark.parametrize("name", list(HUB))
def test_hub_texts_are_pinned(name):
    text = describe(name, None, "concatenate")
    assert len(text.revision) == 40
    assert (text.revision, text.split) == (HUB[name].revision, "test")
    assert resolved_revision(text) == text.revision


def test_refusals(files):
    with pytest.raises(UsageError, match="cannot read"):
        load_text(f"text:{files}/b.txt")
    (files / "binary.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UsageError, match="as UTF-8 text"):
        load_text(f"text:{files}/binary.txt")
    with pytest.raises(UsageError, match="no column 'title'; name one with --text-column: text"):
        load_documents(describe(f"jsonl:{files}/a.jsonl", "title", "whole"))
    with pytest.raises(UsageError, match="datasets cannot load"):
        load_text(str(files / "nothing"))


def test_rows_without_text_are_left_out_and_counted(files, capsys):
    rows = [ROWS[0], {"text": None}, {"text": ""}, {"text": " \n"}, {"body": "3"}, ROWS[1]]
    (files / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = describe(f"jsonl:{files}/a.jsonl", None, "whole")
    assert load_documents(text) == (["one", "two"], "\n\n", 4)
    assert tokenize(Characters(), text) == [[ord(c) for c in "one"], [ord(c) for c in "two"]]
    assert "jsonl:a.jsonl: 4 row(s) without text in 'text' are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "kind"), [(3, "int 3"), ([1, 2], r"list \[1, 2\]"), (b"x", "bytes"), (1.5, "float")]
)
def test_a_column_of_another_type_is_refused_in_every_kind_of_file(files, value, kind):
    import pyarrow as pa
    from pyarrow import parquet

    rows = pa.Table.from_pylist([{"text": None, "body": "1"}, {"text": value, "body": "2"}])
    parquet.write_table(rows, files / "a.parquet")
    folder = files / "other"
    folder.mkdir()
    parquet.write_table(rows, folder / "test.parquet")
    for name in (f"parquet:{files}/a.parquet", str(folder)):
        with pytest.raises(
            UsageError, match=rf"row 2 of .* holds {kind}.*--text-column: text, body"
        ):
            load_text(name)
        assert load_documents(describe(name, "body", "whole")).texts == ["1", "2"]


def test_documents_are_joined_or_kept(files):
    name = f"jsonl:{files}/a.jsonl"
    joined = tokenize(Characters(), describe(name, None, "concatenate"))
    assert joined == [[ord(c) for c in "one\n\ntwo"]]
    assert tokenize(Characters(), describe(name, None, "whole")) == [
        [ord(c) for c in "one"],
        [ord(c) for c in "two"],
    ]


def test_wikitexts_documents_are_its_articles(monkeypatch):
    rows = [" = First = \n", " == Part == \n", " Words . \n", "", " = Second = \n", " More . \n"]
    monkeypatch.setattr("harness.inputs.corpora.read_rows", lambda text, known, others: rows)
    documents = load_documents(Text("wikitext"))
    assert documents.texts == ["".join(rows[:4]), "".join(rows[4:])]
    assert (documents.separator, documents.skipped_rows) == ("", 0)


def test_windows_stay_within_documents():
    documents = [list(range(250)), list(range(1000, 1090)), list(range(2000, 2300))]
    for seed in range(20):
        windows = draw_windows(documents, 4, 100, seed)
        assert len(windows) == 4
        for start, window in windows:
            assert window == list(range(window[0], window[0] + 100))
            # Starts count over all documents in a row.
            assert start == (window[0] if window[0] < 1000 else window[0] - 2000 + 340)
        seen = [token for _, window in windows for token in window]
        assert len(set(seen)) == len(seen)


def test_too_few_long_documents_are_told_with_the_numbers():
    with pytest.raises(UsageError, match=r"1 of the text's 2 documents .* 100 tokens.* 2 windows"):
        draw_windows([range(250), range(90)], 3, 100, seed=0)


def test_prompts_repeat_by_seed():
    documents = [range(50), range(50, 100)]
    prompts = draw_prompts(documents, 9, 30, seed=1)
    assert prompts == draw_prompts(documents, 9, 30, seed=1)
    assert all(p == list(range(p[0], p[0] + 30)) for p in prompts)
    with pytest.raises(UsageError, match="100 tokens, fewer than a prompt of 101"):
        draw_prompts(documents, 1, 101, seed=0)


MANY_BYTES = "naïve café — 日本語のテキスト。👩‍🚀🎉 ﷽ Ελλάδα\n" * 40


@pytest.mark.parametrize("length", [2, 3, 8, 64])
def test_windows_count_the_bytes_of_their_tokens_and_of_no_character_twice(smollm2, length):
    tokenizer = load_tokenizer(smollm2)
    (tokens,) = encode(tokenizer, "whole", Documents([MANY_BYTES], ""))
    # Windows whose scored tokens, in a row, are all of the text but its first token.
    step = length - 1
    windows = [tokens[at : at + length] for at in range(0, len(tokens) - 1, step)]
    first = len(tokenizer.decode(tokens[:1]).encode())
    sizes = [scored_text(tokenizer, window, 1)["scored_bytes"] for window in windows]
    assert first + sum(sizes) == len(MANY_BYTES.encode())
    naive = [len(tokenizer.decode(window[1:]).encode()) for window in windows]
    assert sum(naive) > sum(sizes), "the text does cut characters"


def test_bytes_that_a_sentencepiece_vocabulary_falls_back_to():
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    bytes_ = {f"<0x{value:02X}>": value for value in range(256)}
    vocabulary = {**bytes_, "▁a": 256, "é": 257, "▁": 258, "a": 259}
    made = Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    text = "a aé 日 a"
    (tokens,) = encode(tokenizer, "whole", Documents([text], ""))
    sizes = [
        scored_text(tokenizer, tokens[at : at + 2], 1)["scored_bytes"]
        for at in range(len(tokens) - 1)
    ]
    assert sizes == [2, 2, 1, 1, 1, 1, 2], "' a', 'é', ' ', three bytes, ' a'"


def test_a_tokenizer_of_whole_characters_needs_no_vocabulary():
    assert token_bytes(Characters(), [233]) is None


def test_the_scored_text_counts_bytes_and_words():
    window = [ord(c) for c in "ab cd élan"]
    assert scored_text(Characters(), window, 3) == {"scored_bytes": 8, "scored_words": 2}
