"""A serving study: which servers, which loads; from a YAML file."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from vllm_plugins.config import EvictionConfig

from ..client.checks import check_json, check_numbers
from ..client.load_settings import LoadSpecification
from ..client.slo import check_run_slo
from ..errors import UsageError
from ..inputs.corpora import describe as describe_text
from ..inputs.models import DEFAULT_MODEL, fingerprint, recorded_name, resolve_model
from ..records.specifications import DENSE, digest, level
from .levels import levels_for
from .plan import Comparison, slug
from .specification import Method

STOCK = "stock"
"""A server without the plugin: plain ``vllm serve`` under the same flags."""
_OF_A_METHOD = ("sparsity", "budget_tokens", "rates", "seeds")
"""What a method may have for itself, beside its policy, name and args."""
_KINDS = {
    **dict.fromkeys(("methods", *_OF_A_METHOD), list),
    **dict.fromkeys(("eviction", "server", "environment", "load", "slo", "vary"), dict),
}
_OF_THE_STUDY = ("kv_policy", "kv_sparsity", "kv_budget_tokens")
_NAMES = {list: "list", dict: "mapping"}


@dataclass(frozen=True)
class ServingStudy:
    """Methods x sparsities x rates x seeds; the keys of a study's YAML file."""

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
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None
        except yaml.YAMLError as error:
            raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, Mapping):
            raise UsageError(f"{path} holds no mapping of settings")
        return cls.parse(values)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> ServingStudy:
        """From untyped settings."""
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {sorted(known)}"
                raise UsageError(f"unknown setting {name!r} of a serving study; {hint}")
        for name, kind in _KINDS.items():
            if not isinstance(values.get(name, kind()), kind):
                raise UsageError(f"{name} of a serving study must be a {_NAMES[kind]}")
        lists = {name: tuple(values[name]) for name, kind in _KINDS.items()
                 if kind is list and name in values}  # fmt: skip
        study = cls(**{**values, **lists})
        study._validate()
        return study

    def _validate(self) -> None:
        if not self.methods or not self.seeds:
            raise UsageError("a serving study needs at least one of methods and one of seeds")
        for name in ("policy", "sparsity", "budget_tokens", "request_policies"):
            if name in self.eviction:
                raise UsageError(f"eviction.{name} is set by methods and sparsity; remove it")
        given = (
            vars(self)
            if self.vocabulary_size is not None
            else {name: value for name, value in vars(self).items() if name != "vocabulary_size"}
        )
        check_numbers(type(self), given)
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
        for name in ("eviction", "server", "environment"):
            check_json(name, getattr(self, name))
        settings = self.load.get("settings")
        if own := [n for n in _OF_THE_STUDY if isinstance(settings, Mapping) and n in settings]:
            raise UsageError(
                f"load.settings.{own[0]} would make every run another than its method and "
                "sparsity say; set methods and sparsity instead"
            )
        check_run_slo(self.slo)
        runs = self.runs()
        names = [run.file_name for run in runs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(f"methods name the run {twice.removesuffix('.json')} twice")
        for run in runs:
            _ = run.load  # a wrong one shows before the first server starts
            if run.method.policy != STOCK:
                config = EvictionConfig.parse(self.settings(run))
                config.check_budget(self.block_size)
        for name, values in self.vary.items():
            known = str(name).partition(".")[0] in _KINDS.keys() | {"block_size", "model"}
            if not known or name in ("vary", "slo"):
                raise UsageError(f"vary names {name!r}, which is no setting that can vary")
            if not isinstance(values, list) or not values:
                raise UsageError(f"vary.{name} must be a list of values")

    def settings(self, run: ServingRun) -> dict[str, Any]:
        """Eviction settings of a run's server: one policy, and no request may ask for another."""
        policy = run.method.policy
        args = {**self.eviction.get("policy_args", {}).get(policy, {}), **run.method.args}
        budget = (
            {"sparsity": run.sparsity}
            if run.budget_tokens is None
            else {"budget_tokens": run.budget_tokens}
        )
        settings = {**self.eviction, "policy": policy, **budget, "request_policies": []}
        return settings | ({"policy_args": {policy: args}} if args else {})

    def points(self, folder: Path) -> list[Comparison]:
        """The runs of each point of ``vary``, and the folder of their records.

        A name may be that of a setting, or of one inside it: ``server.max_num_seqs``.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "vary"}
        found = []
        for combination in itertools.product(*self.vary.values()):
            varied = dict(zip(self.vary, combination, strict=True))
            point = ServingStudy.parse(_with(values, varied))
            target = folder.joinpath(*(slug(f"{name}={value}") for name, value in varied.items()))
            found.append(Comparison(varied, target, tuple(point.runs())))
        if len({point.folder for point in found}) < len(found):
            raise UsageError("vary lists the same value twice; drop one")
        return found

    def runs(self) -> list[ServingRun]:
        """Every run, one server's after the other; those of ``vary`` apart."""
        found = []
        for entry in self.methods:
            own = self._own(entry)
            for method, sparsity, budget in self._levels(own):
                for rate in own["rates"] or (None,):
                    if rate is not None and not (
                        type(rate) in (int, float) and 0 < rate < math.inf
                    ):
                        raise UsageError(f"rates has {rate!r}; give finite numbers above 0")
                    for seed in own["seeds"]:
                        if type(seed) is not int or seed < 0:
                            raise UsageError(f"seeds has {seed!r}; give whole numbers from 0 on")
                        found.append(ServingRun(self, method, sparsity, budget, rate, seed))
        return found

    def to_dict(self) -> dict[str, Any]:
        """The settings as given, files without their folders."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "model": recorded_name(self.model)}

    def _own(self, entry: Any) -> dict[str, Any]:
        """A method with its budgets, rates and seeds; the study's where it names none."""
        values = {name: getattr(self, name) for name in _OF_A_METHOD}
        if not isinstance(entry, Mapping):
            return {"method": entry, **values}
        for name in _OF_A_METHOD:
            if not isinstance(entry.get(name, []), list):
                raise UsageError(f"{name} of method {dict(entry)} must be a list")
        if "budget_tokens" in entry and "sparsity" not in entry:
            values["sparsity"] = ()
        own = {name: entry[name] for name in _OF_A_METHOD if name in entry}
        return {"method": {k: v for k, v in entry.items() if k not in own}, **values, **own}

    def _levels(self, own: Mapping[str, Any]) -> list[tuple[Method, float, int | None]]:
        method = own["method"]
        if method in (STOCK, {"policy": STOCK}):
            return [(Method(STOCK, STOCK), 0.0, None)]
        return levels_for([method], own["sparsity"], own["budget_tokens"])


def _with(values: Mapping[str, Any], varied: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with each setting of ``varied`` in its place."""
    made = {**values}
    for name, value in varied.items():
        outer, dot, inner = str(name).partition(".")
        if not dot:
            made[outer] = list(value) if isinstance(value, tuple) else value
            continue
        if not isinstance(made.get(outer), Mapping):
            raise UsageError(f"vary names {name!r}, but {outer} holds no settings")
        made[outer] = {**made[outer], inner: value}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in made.items()}


@dataclass(frozen=True)
class ServingRun:
    """One load on one server."""

    study: ServingStudy
    method: Method
    sparsity: float
    budget_tokens: int | None
    rate: float | None
    seed: int

    @property
    def server_key(self) -> str:
        """Runs of a study that share it share a server."""
        return f"{self.method.name}_{level(self.sparsity, self.budget_tokens)}"

    @property
    def key(self) -> str:
        rate = "" if self.rate is None else f"_rate{self.rate:g}"
        return f"{self.server_key}{rate}"

    @property
    def file_name(self) -> str:
        """Name of the run's record."""
        return f"{self.key}_seed{self.seed}.json"

    @property
    def load(self) -> LoadSpecification:
        """The load: the study's, at this rate and seed."""
        own = {"seed": self.seed} | ({} if self.rate is None else {"request_rate": self.rate})
        return LoadSpecification.parse({**self.study.load, **own})

    @cached_property
    def described(self) -> dict[str, Any]:
        """What a record says about its run, but for the load."""
        study = self.study
        values = {
            "method": self.method.name,
            "policy": self.method.policy,
            "args": self.method.args,
            "sparsity": self.sparsity,
            "budget_tokens": self.budget_tokens,
            "request_rate": self.rate,
            "seed": self.seed,
            "model": recorded_name(study.model),
            "model_fingerprint": fingerprint(resolve_model(study.model)),
            "block_size": study.block_size,
            "eviction": study.eviction,
            "server": study.server,
            "environment": study.environment,
            "warm_up_requests": study.warm_up_requests,
            "slo": study.slo,
        }
        if files := self._files():
            values["files"] = files
        return values

    def to_dict(self) -> dict[str, Any]:
        """Everything that the run's figures depend on, as plain JSON values."""
        return {**self.described, "load": self.load.to_dict()}

    @property
    def hash(self) -> str:
        """The same for the same run on every machine."""
        return digest(self.to_dict())

    def _files(self) -> dict[str, str]:
        """SHA-256 of each local file the load reads: a name alone would not tell two apart."""
        load = self.load
        read = [load.dataset] if load.prompts == "text" else []
        read += [load.quality.dataset] if load.quality.share else []
        texts = [describe_text(name, None, "concatenate") for name in read]
        files = {text.dataset: text.sha256 for text in texts if text.dataset_path and text.sha256}
        if load.trace is not None:
            trace = Path(load.trace)
            try:
                files[trace.name] = hashlib.sha256(trace.read_bytes()).hexdigest()
            except OSError as error:
                raise UsageError(f"cannot read trace {trace}: {error.strerror}") from None
        return files
