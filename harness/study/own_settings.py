"""What a method of a study may have for itself: budgets, seeds, rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError


def own_settings(entry: Any, study: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A method as ``levels_for`` takes it, under ``method``, and each setting of ``names``.

    A setting is the method's where it has it, else the study's. A method with tokens as its
    budget and no sparsity is run at no sparsity.

    Args:
        entry: a method as given: a name, or a mapping.
        study: its settings by name.
        names: what a method may have for itself; lists.

    Raises:
        UsageError: a setting of the method is no list.

    """
    values = {name: study[name] for name in names}
    if not isinstance(entry, Mapping):
        return {"method": entry, **values}
    for name in names:
        if not isinstance(entry.get(name, []), list):
            raise UsageError(f"{name} of method {dict(entry)} must be a list")
    if "budget_tokens" in entry and "sparsity" not in entry:
        values["sparsity"] = ()
    own = {name: entry[name] for name in names if name in entry}
    return {"method": {k: v for k, v in entry.items() if k not in own}, **values, **own}
