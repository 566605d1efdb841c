"""What an engine of this process plans to pack, as a test's reference has to be told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from vllm_plugins.ledger import Ledger
from vllm_plugins.packs import Pack


@contextmanager
def planned_packs() -> Iterator[list[Pack]]:
    """All packs that the scheduler hands to the workers meanwhile, in order."""
    packs: list[Pack] = []
    take = Ledger.take_packs

    def recording(ledger: Ledger) -> dict[str, list[Pack]]:
        taken = take(ledger)
        packs.extend(pack for planned in taken.values() for pack in planned)
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "take_packs", recording)
        yield packs


def decisions_of(record: dict[str, Any], packs: list[Pack]) -> dict[int, int]:
    """Of a finished request with one budget and one layer group: tokens that the scores included
    when it was packed, to the tokens that no step in flight could read, whose blocks were the
    candidates. With asynchronous scheduling there are fewer of these.

    Its packs are told by their region, the same physical blocks from the first one on.
    """
    region = record["trace"][-1]["region"]
    own = [pack for pack in packs if pack.block_ids[: pack.num_kept_blocks] == region]
    return {
        pack.num_tokens: entry["tokens"] for pack, entry in zip(own, record["trace"], strict=True)
    }
