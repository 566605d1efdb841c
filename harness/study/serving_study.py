"""A serving study: which servers, which loads; from a YAML file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vllm_plugins.config import EvictionConfig

from ..client.checks import check_json, check_numbers
from ..client.load_settings import LoadSpecification
from ..client.slo import check_run_slo
from ..errors import UsageError
from ..inputs.models import DEFAULT_MODEL, fingerprint, recorded_name, resolve_model
from ..records.specifications import DENSE, STOCK
from .levels import levels_for
from .own_settings import own_settings
from .points import (
    Comparison,
    check_file_names,
    check_given,
    check_seeds,
    check_vary,
    points_of,
    typed_settings,
)
from .run import Run
from .serving_specification import HttpLoad, ServerSpecification, ServingRun, server_settings
from .settings import check_folder_name, read_study

_OF_A_METHOD = ("sparsity", "budget_tokens", "rates", "seeds")
"""What a method may have for itself, beside its policy, name and args."""
_KINDS = {
    **dict.fromkeys(("methods", *_OF_A_METHOD), list),
    **dict.fromkeys(("eviction", "server", "environment", "load", "slo", "vary"), dict),
}
_OF_THE_STUDY = ("kv_policy", "kv_sparsity", "kv_budget_tokens")


@dataclass(frozen=True)
class ServingStudy:
    """Methods x sparsities x rates x seeds; the keys of a study's YAML file."""

    name: str | None = None
    """Of the study's folder; None: the file's."""
    model: str = DEFAULT_MODEL
    methods: tuple[Any, ...] = (DENSE, "h2o", "cab")
    """Names, or ``{policy: cab, name: cab-forman, args: {bridge_definition: forman}, sparsity:
    [0.5], budget_tokens: [1024], rates: [4, 5], seeds: [0, 1]}`` with some of these."""
    sparsity: tuple[float, ...] = (0.9,)
    budget_tokens: tuple[int, ...] = ()
    """Absolute budgets, beside the sparsities."""
    rates: tuple[float, ...] = ()
    """Requests per second; empty for loads without one (closed loop, trace)."""
    seeds: tuple[int, ...] = (0,)
    block_size: int = 32
    eviction: dict[str, Any] = field(default_factory=dict)
    """Server-wide eviction settings besides policy and sparsity."""
    server: dict[str, Any] = field(default_factory=dict)
    """Engine arguments and front-end flags of ``vllm serve``, names with underscores."""
    environment: dict[str, str] = field(default_factory=dict)
    startup_timeout_s: float = 600.0
    warm_up_requests: int = 4
    """Sent to each new server before anything is measured: first steps are slow."""
    vocabulary_size: int | None = None
    """For models without a tokenizer; random prompts only."""
    load: dict[str, Any] = field(default_factory=dict)
    slo: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of a run: ``{time_to_first_token_ms: {p99: 2000}}``."""
    vary: dict[str, list[Any]] = field(default_factory=dict)
    """Setting to values, like ``server.max_num_seqs``: each combination is a table of its own."""

    @classmethod
    def read(cls, path: Path) -> ServingStudy:
        """Read and check a study.

        Raises:
            UsageError: no such file, not YAML, or a setting is wrong.

        """
        return cls.parse(read_study(path))

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> ServingStudy:
        """From untyped settings."""
        study = cls(**typed_settings(values, cls, _KINDS, "a serving study"))
        study._validate()
        return study

    def _validate(self) -> None:
        if not self.methods or not self.seeds:
            raise UsageError("a serving study needs at least one of methods and one of seeds")
        for name in ("policy", "sparsity", "budget_tokens", "request_policies"):
            if name in self.eviction:
                raise UsageError(f"eviction.{name} is set by methods and sparsity; remove it")
        if self.name is not None:
            check_folder_name(self.name, "name")
        optional = ("name", "vocabulary_size")
        check_numbers(
            type(self), {k: v for k, v in vars(self).items() if k not in optional or v is not None}
        )
        for name, least in (("block_size", 1), ("warm_up_requests", 0), ("vocabulary_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} is {value}; give a whole number of at least {least}")
        if "api_key" in self.server or "VLLM_API_KEY" in self.environment:
            raise UsageError(
                "every record would hold the server's API key; export VLLM_API_KEY instead"
            )
        if not self.startup_timeout_s > 0:
            raise UsageError(
                f"startup_timeout_s is {self.startup_timeout_s:g}; give a number above 0"
            )
        for name in ("server", "environment"):
            check_json(name, getattr(self, name))
        check_given(LoadSpecification, self.load, "load")
        settings = self.load.get("settings")
        if own := [n for n in _OF_THE_STUDY if isinstance(settings, Mapping) and n in settings]:
            raise UsageError(
                f"load.settings.{own[0]} would make every run another than its method and "
                "sparsity say; set methods and sparsity instead"
            )
        check_run_slo(self.slo)
        runs = self.runs()
        check_file_names(runs)
        for run in runs:
            if run.method.policy != STOCK:
                EvictionConfig.parse(server_settings(run)).check_budget(self.block_size)
        check_vary(self.vary, {*_KINDS, "block_size", "model"} - {"vary", "slo"})

    def points(self, folder: Path) -> list[Comparison]:
        """The runs of each point of ``vary``, and the folder of their records.

        A name may be that of a setting, or of one inside it: ``server.max_num_seqs``.
        """
        return points_of(self, folder)

    def runs(self) -> list[ServingRun]:
        """Every run, one server's after the other; those of ``vary`` apart."""
        path = resolve_model(self.model)
        server = ServerSpecification(
            model=recorded_name(self.model),
            model_fingerprint=fingerprint(path),
            block_size=self.block_size,
            eviction=self.eviction,
            server=self.server,
            environment=self.environment,
            warm_up_requests=self.warm_up_requests,
            startup_timeout_s=self.startup_timeout_s,
            vocabulary_size=self.vocabulary_size,
            model_name=self.model,
            model_path=path,
        )
        found: list[ServingRun] = []
        for entry in self.methods:
            own = own_settings(entry, vars(self), _OF_A_METHOD)
            for method, budget in levels_for(
                [own["method"]], own["sparsity"], own["budget_tokens"]
            ):
                for rate in own["rates"] or (None,):
                    for seed in check_seeds(own["seeds"]):
                        load = HttpLoad(self._load(rate, seed), rate, self.slo)
                        found.append(Run(server, method, budget, seed, load))
        return found

    def _load(self, rate: Any, seed: int) -> LoadSpecification:
        if rate is not None and not (type(rate) in (int, float) and 0 < rate < math.inf):
            raise UsageError(f"rates has {rate!r}; give finite numbers above 0")
        own = {"seed": seed} | ({} if rate is None else {"request_rate": rate})
        return LoadSpecification.parse({**self.load, **own})

    def to_dict(self) -> dict[str, Any]:
        """The settings as given, files without their folders."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "model": recorded_name(self.model)}
