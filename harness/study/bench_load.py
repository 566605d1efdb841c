"""What a bench run measures: the load of a study's file, or a method's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeAlias

from ..client.checks import check_numbers
from ..errors import UsageError
from ..records.specifications import BATCH, STEADY
from .batch_specification import Batch, BatchEngineSpecification
from .points import check_known
from .run import Run
from .steady_load import SteadyLoad

BenchLoad: TypeAlias = Batch | SteadyLoad
BenchRun: TypeAlias = Run[BatchEngineSpecification, BenchLoad]
_NUM_REQUIRED = 3
"""The first fields of either load have no default."""
_MAY_BE_0 = ("shared_tokens", "turn_tokens")


def parse_load(values: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> BenchLoad:
    """The load of a method.

    Args:
        values: the study's ``load``: ``kind``, ``batch`` unless it is given, and the fields of
            ``Batch`` or of ``SteadyLoad``.
        own: fields that the method lays over it.

    Raises:
        UsageError: the first setting that is wrong.

    """
    load = _parse(values)
    if not own:
        return load
    if "kind" in own:
        raise UsageError("load.kind is the study's; drop it from the load of a method")
    return replace(_parse({**values, **own}), study_load=load.to_dict())


def _parse(values: Mapping[str, Any]) -> BenchLoad:
    kind = values.get("kind", BATCH)
    given = {name: value for name, value in values.items() if name != "kind"}
    if kind == BATCH:
        _check_names(Batch, given, "the load of a bench study")
        return _batch(given)
    if kind == STEADY:
        _check_names(SteadyLoad, given, "the steady load of a bench study")
        return SteadyLoad.parse(given)
    raise UsageError(f"load.kind is {kind!r}; give {BATCH} or {STEADY}")


def _check_names(load: type[Batch | SteadyLoad], values: Mapping[str, Any], what: str) -> None:
    names = [f.name for f in fields(load) if f.name != "study_load"]
    check_known(values, names, what)
    for name in names[:_NUM_REQUIRED]:
        if name not in values:
            pair = load is SteadyLoad and name == "output_tokens"
            wanted = "the shortest and the longest" if pair else "a whole number"
            raise UsageError(f"{what.removeprefix('the ')} has no {name}; give {wanted}")


def _batch(values: Mapping[str, Any]) -> Batch:
    check_numbers(Batch, values)
    for name, value in values.items():
        if value < (least := 0 if name in _MAY_BE_0 else 1):
            raise UsageError(f"load.{name} is {value}; give at least {least}")
    batch = Batch(**values)
    if batch.shared_tokens > batch.prompt_tokens:
        raise UsageError(
            f"load.shared_tokens is {batch.shared_tokens}, more than load.prompt_tokens "
            f"{batch.prompt_tokens}; lower the one or raise the other"
        )
    if batch.turns > 1 and batch.beam_width > 1:
        raise UsageError(
            f"load.turns is {batch.turns} and load.beam_width {batch.beam_width}; a conversation "
            "goes on from one answer, so drop one of them"
        )
    if batch.turns > 1 and not batch.turn_tokens:
        raise UsageError("load.turn_tokens is 0; each turn after the first brings at least 1")
    return batch
