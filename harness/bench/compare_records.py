"""Two folders of records of one study, side by side: ``scripts/reproduce_wikitext``.

    python -m harness.bench.compare_records results/wikitext-1024 runs/wikitext-1024

Prints a table of perplexities. The folders must hold the same methods on the same windows.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import UsageError
from ..records.stored import read_records
from ..report.agreement import agreement_table


def main() -> None:
    first, second = map(Path, sys.argv[1:])
    try:
        table = agreement_table(read_records(first), read_records(second))
    except UsageError as error:
        print(f"compare_records: {error}", file=sys.stderr)
        sys.exit(2)
    print(table)


if __name__ == "__main__":
    main()
