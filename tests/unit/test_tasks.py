"""Tasks: what is asked, what an answer scores, and files of a user's own."""

import json
import re

import numpy as np
import pytest

from harness.analysis.task_scores import repetition, same_beginning, score, unigram_f1
from harness.errors import UsageError
from harness.inputs.tasks.haystack import Haystack, hide
from harness.inputs.tasks.jsonl import read_lines
from harness.inputs.tasks.registry import (
    GENERATED,
    LONG_GENERATION,
    TASKS,
    Asked,
    draw_samples,
    read_samples,
)
from harness.inputs.tasks.sample import FILLED

from .records import Characters

CONTEXT = 6000
"""Characters, which are tokens here."""
NEEDLES = [name for name in GENERATED if name.startswith("niah")]


@pytest.fixture(scope="module")
def haystack():
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, size=rng.integers(4, 9))) for _ in range(900)]
    told = [" ".join(rng.choice(words, size=9)).capitalize() + "." for _ in range(1500)]
    return Haystack(Characters(), [Characters()(" ".join(told)).input_ids])


def drawn(haystack, name, seed=0, num=3, context=CONTEXT, question="after", output=64):
    asked = Asked(num, context, question, output)
    return draw_samples(name, Characters(), haystack, asked, seed)


def text_of(sample):
    return "".join(map(chr, sample.prompt))


@pytest.mark.parametrize("name", TASKS)
def test_samples_repeat_by_seed_and_differ_from_each_other(haystack, name):
    first = drawn(haystack, name, seed=3)
    assert first == drawn(haystack, name, seed=3)
    assert first != drawn(haystack, name, seed=4)
    assert len({text_of(sample) for sample in first}) == 3
    assert drawn(haystack, name, seed=3, num=2) == first[:2], "more samples are others added"


@pytest.mark.parametrize("question", ["after", "before"])
@pytest.mark.parametrize("name", GENERATED)
def test_prompts_fill_the_context_and_leave_room_for_the_answer(haystack, name, question):
    for sample in drawn(haystack, name, question=question):
        room = CONTEXT - sample.max_tokens
        assert FILLED * room <= len(sample.prompt) <= room


@pytest.mark.parametrize("name", [*NEEDLES, "code_completion", "multi_turn"])
def test_what_is_expected_stands_in_the_text_once(haystack, name):
    for sample in drawn(haystack, name, num=6):
        assert [text_of(sample).count(value) for value in sample.expected] == [1] * len(
            sample.expected
        )


def test_needles_have_their_numbers_and_stand_where_the_question_says(haystack):
    counts = {name: len(drawn(haystack, name)[0].expected) for name in NEEDLES}
    assert list(counts.values()) == [1, 1, 4, 4]
    for name in NEEDLES:
        text = text_of(drawn(haystack, name)[0])
        found = dict(re.findall(r"numbers for ([a-z-]+) is: (\d{7})\.", text))
        assert len(re.findall(r"is: \d{7}\.", text)) == (1 if name == "niah_single" else 4)
        question = text[text.rindex("\n") :]
        asked = [key for key in found if key in question]
        assert len(asked) == (4 if name == "niah_multiquery" else 1)


def test_a_chain_of_variables_leads_from_the_value_to_every_name(haystack):
    (sample, *_) = drawn(haystack, "variable_tracking")
    text = text_of(sample).split("hidden in the following text.")[-1]
    value = re.search(r"assigned the value (\d+)", text)[1]
    names = [re.search(rf"VAR (\w+) = {value}\.", text)[1]]
    while found := re.search(rf"VAR (\w+) = VAR {names[-1]}\.", text):
        names.append(found[1])
    assert tuple(names) == sample.expected
    assert len(names) == 5


def test_common_words_stand_more_often_than_all_others(haystack):
    for context, often, other in ((3000, 6, 1), (12000, 30, 3)):
        (sample, *_) = drawn(haystack, "common_words", context=context)
        words = re.findall(r"\d+\. ([a-z]+)", text_of(sample))
        counts = {word: words.count(word) for word in words}
        assert {counts[word] for word in sample.expected} == {often}
        assert {n for word, n in counts.items() if word not in sample.expected} == {other}


def test_frequent_words_are_the_three_most_frequent_but_for_dots(haystack):
    (sample, *_) = drawn(haystack, "frequent_words")
    words = text_of(sample).split("\n")[1].split()
    ranked = sorted(set(words), key=words.count, reverse=True)
    assert tuple(ranked[:4]) == ("...", *sample.expected)
    assert words.count(ranked[3]) > words.count(ranked[4])


def test_code_is_python_and_asks_for_something_far_above(haystack):
    (sample, *_) = drawn(haystack, "code_completion")
    source = text_of(sample)
    places: dict[str, object] = {}
    exec(f"{source} {sample.expected[0]}", places)  # the test at its end passes
    assert source.index(sample.expected[0]) < 0.6 * len(source)


def test_a_conversation_asks_for_a_fact_of_its_first_turn(haystack):
    (sample, *_) = drawn(haystack, "multi_turn")
    text = text_of(sample)
    first, *_, last = text.split("User: ")[1:]
    assert len(text.split("User: ")) == 1 + 1 + 4 + 1
    thing = re.search(r"What is my ([a-z ]+)\?", last)[1]
    assert f"My {thing} is {sample.expected[0]}." in first
    assert text.endswith(f"Assistant: Your {thing} is")


@pytest.mark.parametrize("name", GENERATED)
def test_the_question_stands_before_the_text_only_where_asked_for(haystack, name):
    after, before = (text_of(drawn(haystack, name, question=q)[0]) for q in ("after", "before"))
    assert not after.startswith(before[:40])
    assert after[-30:] == before[-30:], "at the end in any case"
    asked = {
        "code_completion": "is tested.",
        "multi_turn": "I will ask for my",
        "variable_tracking": "Find all variables",
        "common_words": "most common words",
        "frequent_words": "most frequently appeared words",
    }.get(name, "mentioned in the provided text?")
    assert asked in before[:400]
    if asked != "Find all variables":  # which the example asks too
        assert asked not in after[:400]


def test_free_answers_begin_at_a_window_of_the_text(haystack):
    (sample, *_) = drawn(haystack, LONG_GENERATION, output=100)
    assert (len(sample.prompt), sample.max_tokens) == (CONTEXT - 100, 100)
    assert (sample.expected, sample.metric) == ((), None)


def test_too_little_context_or_text_is_refused(haystack):
    with pytest.raises(UsageError, match=r"takes \d+ tokens without any filler, and 268 fit"):
        drawn(haystack, "niah_single", context=300)
    with pytest.raises(UsageError, match="leaves no prompt beside the 96 tokens"):
        drawn(haystack, "niah_multivalue", context=90)
    with pytest.raises(UsageError, match="fewer than a prompt"):
        drawn(haystack, "niah_single", context=100_000)
    few = Haystack(Characters(), [Characters()("only these words " * 2000).input_ids])
    with pytest.raises(UsageError, match="3 different words of four to ten letters, too few"):
        drawn(few, "common_words")


def test_needles_stand_between_sentences():
    made = hide("One. Two. Three. Four.", ["A.", "B.", "C."], [0.0, 0.5, 1.0])
    assert made == "A. One. Two. B. Three. Four. C."
    assert hide("no sentence here", ["A."], [0.34]) == "no A. sentence here"


@pytest.mark.parametrize(
    ("metric", "answer", "expected", "wanted"),
    [
        ("all", "it is 12 and 34", ["12", "34", "56", "78"], 0.5),
        ("all", "ABC", ["abc"], 1.0),
        ("contains", "so it is Paris.", ["London", "paris"], 1.0),
        ("contains", "so it is Rome.", ["London", "paris"], 0.0),
        ("exact", "\n 42.\nand so on", ["41", "42"], 1.0),
        ("exact", "it is 42", ["42"], 0.0),
        ("exact", "", ["42"], 0.0),
        ("f1", "The cat, sat", ["a cat sat"], 1.0),
        ("f1", "cat sat", ["dog", "cat stood"], 0.5),
        ("f1", "", ["dog"], 0.0),
    ],
)
def test_scores(metric, answer, expected, wanted):
    assert score(metric, answer, expected) == pytest.approx(wanted)


def test_a_score_needs_something_expected():
    with pytest.raises(ValueError, match="without anything expected"):
        score("all", "a", [])


def test_what_free_answers_are_like():
    assert repetition([1, 2, 3]) == 0.0
    assert repetition(list(range(20))) == 0.0
    assert repetition([7] * 20) == pytest.approx(1 - 1 / 17)
    assert same_beginning([1, 2, 3, 4], [1, 2, 9, 4]) == 0.5
    assert same_beginning([1, 2], [1, 2, 3, 4]) == 0.5
    assert same_beginning([], []) == same_beginning([5], [5]) == 1.0
    assert unigram_f1([1, 1, 2], [1, 2, 2]) == pytest.approx(2 / 3)
    assert (unigram_f1([], []), unigram_f1([], [1])) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 2: no JSON; give an object"),
        ("[1]", "line 2: no JSON object"),
        ('{"answers": ["a"]}', 'line 2: "prompt" must be a text'),
        ('{"prompt": "a"}', 'line 2: "answers" must be a list of texts'),
        ('{"prompt": "a", "answers": []}', 'line 2: "answers" must be a list of texts'),
        ('{"prompt": "a", "answers": [1]}', 'line 2: "answers" must be a list of texts'),
        (
            '{"prompt": "a", "answers": ["b"], "metric": "rouge"}',
            "\"metric\" is 'rouge'; use one of: exact, contains, f1",
        ),
        (
            '{"prompt": "a", "answers": ["b"], "max_tokens": 0}',
            '"max_tokens" is 0; give a whole number of at least 1',
        ),
    ],
)
def test_a_bad_line_of_a_file_is_named(tmp_path, line, sentence):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "answers": ["b"]}\n' + line + "\n")
    with pytest.raises(UsageError, match=r"^[^\n]+$") as refusal:
        read_lines(path)
    assert f"{path}, " in str(refusal.value)
    assert sentence in str(refusal.value)


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot read the task"):
        read_lines(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UsageError, match="holds no line"):
        read_lines(tmp_path / "empty.jsonl")


def test_a_files_lines_are_asked_as_they_are(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"number {i}?", "answers": [str(i)], "length": 9} for i in range(20)]
    rows[3] |= {"metric": "f1", "max_tokens": 5}
    path.write_text("\n\n".join(map(json.dumps, rows)))
    asked = Asked(99, 100, "after", 7)
    samples = read_samples(path, Characters(), asked, 0)
    assert [text_of(s) for s in samples] == [row["prompt"] for row in rows]
    assert (samples[3].metric, samples[3].max_tokens) == ("f1", 5)
    assert (samples[4].metric, samples[4].max_tokens, samples[4].expected) == (
        "contains",
        7,
        ("4",),
    )
    few = [read_samples(path, Characters(), Asked(6, 100, "after", 7), s) for s in (0, 0, 1)]
    assert few[0] == few[1] != few[2]
    assert len(few[0]) == 6


def test_a_prompt_too_long_is_never_cut(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('\n{"prompt": "0123456789", "answers": ["b"]}')
    assert read_samples(path, Characters(), Asked(9, 15, "after", 5), 0)
    with pytest.raises(
        UsageError, match=r"line 2: a prompt of 10 tokens and an answer of 6 do not fit into --con"
    ):
        read_samples(path, Characters(), Asked(9, 15, "after", 6), 0)
