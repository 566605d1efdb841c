"""The points of a study that varies something: each combination is a table of its own."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vllm_plugins.config import EvictionConfig, parse_settings

from ..errors import UsageError
from .run import Run

_KIND_NAMES: dict[type, str] = {list: "list", dict: "mapping"}


@dataclass(frozen=True)
class Comparison:
    """One point of a study: runs that stand in one table, and where they go."""

    varied: dict[str, Any]
    folder: Path
    runs: tuple[Run[Any, Any], ...]


def comparisons_of(
    vary: Mapping[str, Iterable[Any]],
    folder: Path,
    runs: Callable[[dict[str, Any]], Sequence[Run[Any, Any]]],
    shown: Callable[[str, Any], Any] = lambda name, value: value,
) -> list[Comparison]:
    """The runs of each combination of ``vary``, and the folder of their records.

    Args:
        vary: a setting's name to its values.
        folder: of the experiment; a study that varies something has a folder below per point.
        runs: of the study with these settings in place of its own.
        shown: a setting's value as records and folders tell it.

    Raises:
        UsageError: two combinations are the same.

    """
    points = []
    for combination in itertools.product(*vary.values()):
        varied = dict(zip(vary, combination, strict=True))
        told = {name: shown(name, value) for name, value in varied.items()}
        target = folder.joinpath(*(slug(f"{name}={value}") for name, value in told.items()))
        points.append(Comparison(told, target, tuple(runs(varied))))
    if len({point.folder for point in points}) < len(points):
        raise UsageError("vary lists the same value twice; drop one")
    return points


def with_varied(values: Mapping[str, Any], varied: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with each setting of ``varied`` in its place, tuples as lists.

    A name may be that of a setting, or of one inside it: ``server.max_num_seqs``.

    Raises:
        UsageError: a name leads into a setting that holds no others.

    """
    made = {**values}
    for name, value in varied.items():
        outer, dot, inner = str(name).partition(".")
        if not dot:
            made[outer] = value
            continue
        if not isinstance(made.get(outer), Mapping):
            raise UsageError(f"vary names {name!r}, but {outer} holds no settings")
        made[outer] = {**made[outer], inner: value}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in made.items()}


def points_of(study: Any, folder: Path) -> list[Comparison]:
    """The points of a study with ``vary``, ``runs`` and ``parse``, as ``comparisons_of``."""
    values = {f.name: getattr(study, f.name) for f in fields(study) if f.name != "vary"}
    parse = type(study).parse
    return comparisons_of(
        study.vary, folder, lambda varied: parse(with_varied(values, varied)).runs()
    )


def check_vary(vary: Mapping[str, Any], can_vary: Iterable[str]) -> None:
    """Refuse names of no setting, and values that are no list.

    Raises:
        UsageError: the first that is wrong.

    """
    for name, values in vary.items():
        if str(name).partition(".")[0] not in set(can_vary):
            raise UsageError(f"vary names {name!r}, which is no setting that can vary")
        if not isinstance(values, list) or not values:
            raise UsageError(f"vary.{name} must be a list of values")


def typed_settings(
    values: Mapping[str, Any], study: type, kinds: Mapping[str, type], what: str
) -> dict[str, Any]:
    """``values`` of a study's file, lists as tuples.

    Args:
        values: by name, as read.
        study: a dataclass; its fields are the settings, ``eviction`` among them.
        kinds: those that are lists or mappings.
        what: the study, in a sentence.

    Raises:
        UsageError: an unknown setting, one without a value, or one of another kind.
        EvictionConfigError: an eviction setting is wrong.

    """
    check_known(values, (f.name for f in fields(study)), what)
    check_given(study, values, what)
    for name, kind in kinds.items():
        if not isinstance(values.get(name, kind()), kind):
            raise UsageError(f"{name} of {what} must be a {_KIND_NAMES[kind]}")
    made = {k: tuple(v) if kinds.get(k) is list else v for k, v in values.items()}
    return {**made, "eviction": eviction_settings(values.get("eviction", {}))}


def eviction_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Server-wide eviction settings of a study or a method, each of its type.

    Raises:
        UsageError: one has no value. ``EvictionConfigError``: one is unknown or wrong.

    """
    check_given(EvictionConfig, values, "eviction")
    return parse_settings(values)


def check_known(values: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuse a setting that ``what`` does not have.

    Raises:
        UsageError: the first unknown one, with the closest known.

    """
    names = sorted(known)
    for name in values:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {names}"
            raise UsageError(f"unknown setting {name!r} of {what}; {hint}")


def check_given(settings: type, values: Mapping[str, Any], what: str) -> None:
    """Refuse a setting without a value, as ``seeds:`` is in YAML, unless None is its default.

    Args:
        settings: a dataclass; its fields have the defaults.
        values: by field.
        what: whose they are, in a sentence.

    Raises:
        UsageError: the first without one.

    """
    for f in fields(settings):
        if values.get(f.name, f.default) is None and f.default is not None:
            raise UsageError(f"{f.name} of {what} is empty; give a value or remove the line")


def check_file_names(runs: Sequence[Run[Any, Any]]) -> None:
    """Refuse two runs whose records would have one name.

    Raises:
        UsageError: the first such name.

    """
    seen: set[str] = set()
    for run in runs:
        if run.file_name in seen:
            raise UsageError(f"methods name the run {run.file_name.removesuffix('.json')} twice")
        seen.add(run.file_name)


def slug(text: str) -> str:
    """``text`` as a file name."""
    return re.sub(r"[^A-Za-z0-9.=+-]+", "-", text).strip("-")


def check_seeds(seeds: Iterable[Any]) -> Iterator[int]:
    """The seeds of a method, checked.

    Raises:
        UsageError: one is no whole number from 0 on.

    """
    for seed in seeds:
        if type(seed) is not int or seed < 0:
            raise UsageError(f"seeds has {seed!r}; give whole numbers from 0 on")
        yield seed
