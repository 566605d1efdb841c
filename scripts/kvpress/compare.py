"""Puts this project's figures beside kvpress's: ``python scripts/kvpress/compare.py FOLDER``.

Reads ``FOLDER/ours`` and ``FOLDER/theirs`` and writes ``FOLDER/report.md``. Needs no engine.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sides import Level, Scored, Sides, read_sides

from harness.errors import UsageError
from harness.records.files import write_text
from harness.report.cells import change
from harness.report.lines import commit_line
from harness.report.tables import Row, markdown

PAIRS = (
    ("streaming_llm", "streaming"),
    ("observed_attention", "h2o-ranked"),
    ("observed_attention", "h2o"),
    ("snapkv-32", "snapkv"),
    ("snapkv", None),
    ("keydiff", "keydiff"),
    ("tova", "tova"),
    ("knorm", "key_norm"),
    ("expected_attention", None),
    (None, "cab"),
)
"""A press and the policy nearest to it; None: the other side has none."""
FIRST = 64
"""Queries right after the prompt that are told apart."""
_MADE_BY = (
    "`scripts/kvpress/compare.py` makes this page from the records beside it. What the two sides "
    "have in common and what not stands in `scripts/kvpress/README.md`."
)


def page(sides: Sides) -> str:
    """The report, in Markdown.

    Raises:
        UsageError: the sides hold nothing to compare.

    """
    parts = ["# kvpress beside this project", *_conditions(sides)]
    chunks = [chunk for chunk in sides.ours if chunk != sides.prompt]
    for kept in sides.budgets:
        tables = {f"{kept} of {sides.prompt} tokens kept, decided once": _once_rows(sides, kept)}
        for chunk in chunks:
            title = f"A budget of {kept} tokens, decided every {chunk}"
            tables[title] = _chunked_rows(sides, kept, chunk)
        for title, rows in tables.items():
            if len(rows) > 1:
                parts += [f"## {title}", markdown(rows)]
    return "\n\n".join([*parts, _MADE_BY]) + "\n"


def _conditions(sides: Sides) -> list[str]:
    theirs, ours = sides.their_record, sides.our_record
    versions = theirs["versions"]
    windows = len(_dense(sides.theirs).windows)
    seen = f"{windows} windows of {sides.length} tokens"
    offset = _dense(sides.ours[sides.prompt]).minus(_dense(sides.theirs), sides.length)
    return [
        f"{theirs['model']}, {theirs['text']['dataset']}, {seen}, the same on both sides "
        f"(SHA-256 of the tokens {theirs['tokens_sha256'][:16]}...). The first {sides.prompt} "
        f"tokens are the prompt; scored are the {sides.length - sides.prompt - 1} tokens from the "
        f"one at {sides.prompt + 1} on.",
        f"- kvpress {versions['kvpress']}, transformers {versions['transformers']}, torch "
        f"{versions['torch']}, {theirs['dtype']}, {_machine(sides)}, "
        f"{theirs['timestamp'][:10]}, commit {theirs['commit']}.\n"
        f"- This project: {ours['engine']['dtype']}, blocks of "
        f"{ours['specification']['engine']['block_size']}, {commit_line(ours)}\n"
        f"- Dense: perplexity {_dense(sides.theirs).perplexity:.3f} there, "
        f"{_dense(sides.ours[sides.prompt]).perplexity:.3f} here, a difference of "
        f"{_difference(offset)} nats per token.",
        "Percentages are against the side's own dense. Differences are in nats per token, ours "
        "less kvpress's, with a 95% interval by Student's t over windows; more is worse.",
    ]


def _machine(sides: Sides) -> str:
    hardware = sides.their_record["hardware"]
    return hardware.get("gpu") or f"{hardware['cpu']}, {hardware['cores']} cores"


def _once_rows(sides: Sides, kept: int) -> list[Row]:
    ours = sides.ours[sides.prompt]
    table: list[Row] = [("kvpress", "ours", "kvpress perplexity", "our perplexity", "difference")]
    for press, method in PAIRS:
        there = sides.theirs.get((press or "", kept))
        here = ours.get((method or "", kept))
        if there is None and here is None:
            continue
        table.append(
            (
                press or "-",
                method or "-",
                _perplexity(there, _dense(sides.theirs)),
                _perplexity(here, _dense(ours)),
                _minus(here, there, sides),
            )
        )
    return table


def _chunked_rows(sides: Sides, kept: int, chunk: int) -> list[Row]:
    ours, once = sides.ours[chunk], sides.ours[sides.prompt]
    first = range(sides.prompt, sides.prompt + FIRST)
    tellable = chunk <= FIRST and not FIRST % chunk
    table: list[Row] = [
        (
            "ours",
            "kvpress",
            "our perplexity",
            "less ours decided once",
            "less kvpress",
            f"less kvpress, first {FIRST}",
        )
    ]
    for press, method in PAIRS:
        here = ours.get((method or "", kept))
        if here is None:
            continue
        there = sides.theirs.get((press or "", kept))
        table.append(
            (
                method or "-",
                press or "-",
                _perplexity(here, _dense(ours)),
                _minus(here, once.get((method or "", kept)), sides),
                _minus(here, there, sides),
                _minus(here, there, sides, first) if tellable else "-",
            )
        )
    return table


def _dense(side: Mapping[Level, Scored]) -> Scored:
    if ("dense", None) not in side:
        raise UsageError("one side lacks dense, which all is measured against; measure it too")
    return side["dense", None]


def _perplexity(scored: Scored | None, dense: Scored) -> str:
    if scored is None:
        return "-"
    return f"{scored.perplexity:.2f} ({change(scored.perplexity, dense.perplexity)})"


def _minus(
    scored: Scored | None, other: Scored | None, sides: Sides, queries: range | None = None
) -> str:
    if scored is None or other is None:
        return "-"
    return _difference(scored.minus(other, sides.length, queries))


def _difference(test: dict[str, Any]) -> str:
    interval = test["interval_95_t"]
    told = f"{test['mean_difference_nats']:+.4f}"
    return told if interval is None else f"{told} [{interval[0]:+.4f}, {interval[1]:+.4f}]"


def main(arguments: list[str]) -> int:
    """Write the page; 2: something that was given is wrong."""
    if len(arguments) != 1:
        print("kvpress study: give the folder that holds ours and theirs", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    try:
        write_text(folder / "report.md", page(read_sides(folder)))
    except UsageError as error:
        print(f"kvpress study: {error}", file=sys.stderr)
        return 2
    print(folder / "report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
