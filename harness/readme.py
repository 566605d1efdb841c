"""Writes the tables between ``<!-- table: NAME -->`` and ``<!-- end -->`` of a README.

    python -m harness.readme README.md results

NAME is a folder of records under ``results``, a folder of such folders (ends with a slash: one row
each), or a benchmark's record. ``<!-- agreement: A B -->`` compares two folders of records of one
study, from two machines. Figures in a README are never typed in.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from .aggregate import aggregate
from .bench.tables import bench_table, settings_table
from .errors import UsageError
from .records import read_json, read_load_records, read_records
from .report.agreement import agreement_table
from .report.tables import caption, markdown_table, provenance_line

_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_AGREEMENT = re.compile(r"(<!-- agreement: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, results: Path) -> str:
    """``text`` with every marked table made anew from its records.

    Raises:
        UsageError: two folders to compare are not of the same windows, or records must not be
            mixed.

    """

    def table(match: re.Match[str]) -> str:
        if match[2].endswith(".json"):
            return f"{match[1]}\n{bench_table(read_json(results / match[2]))}\n\n{match[3]}"
        if match[2].endswith("/"):
            paths = sorted((results / match[2]).glob("*/*_seed*.json"))
            table = settings_table([read_json(path) for path in paths])
            return f"{match[1]}\n{table}\n\n{match[3]}"
        records = read_records(results / match[2])
        recorded = read_json(results / match[2] / "aggregated_results.json")
        current = aggregate(records, read_load_records(results / match[2]))
        if current != recorded:
            raise ValueError(f"{match[2]}/aggregated_results.json does not match its records")
        body = f"{caption(records[0])}, {len({r['seed'] for r in records})} runs.\n"
        body += f"{provenance_line(records[0])}\n\n{markdown_table(current)}\n"
        return f"{match[1]}\n{body}\n{match[3]}"

    def agreement(match: re.Match[str]) -> str:
        first, second = (read_records(results / match[i]) for i in (2, 3))
        return f"{match[1]}\n{agreement_table(first, second)}\n\n{match[4]}"

    return _AGREEMENT.sub(agreement, _MARKED.sub(table, text))


def main() -> None:
    readme, results = map(Path, sys.argv[1:])
    try:
        text = fill(readme.read_text(encoding="utf-8"), results)
    except UsageError as error:
        print(f"readme: {error}", file=sys.stderr)
        sys.exit(2)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
