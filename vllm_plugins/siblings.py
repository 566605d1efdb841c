"""Records of requests that answer one prompt together (``n`` > 1)."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

_CHILD = re.compile(r"(\d+)_(.+)", re.DOTALL)
"""A child's id (``ParentRequest.get_child_info`` in ``vllm/v1/engine/parallel_sampling.py``)."""


class Siblings:
    """Gathers the records of samples, as vLLM hands out only what the last one to end carries.

    Args:
        limit: parents remembered; how many samples one has is not known here.

    """

    def __init__(self, limit: int = 1024) -> None:
        self._limit = limit
        self._records: OrderedDict[str, dict[int, dict[str, Any]]] = OrderedDict()

    def add(self, request_id: str, record: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        """Take in the record of a request that ended.

        Returns:
            the record of a request of its own; of a sample, the list of those that ended so far,
            in the order of samples.

        """
        child = _CHILD.fullmatch(request_id)
        if child is None:
            return record
        index, parent = child.groups()
        samples = self._records.setdefault(parent, {})
        self._records.move_to_end(parent)
        samples[int(index)] = record
        if len(self._records) > self._limit:
            self._records.popitem(last=False)
        return [samples[index] for index in sorted(samples)]
