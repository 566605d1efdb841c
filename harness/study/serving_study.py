"""A serving study: which servers, which loads; from a YAML file."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from vllm_plugins.config import EvictionConfig, parse_sparsity

from ..client.checks import check_json, check_numbers
from ..client.load_settings import LoadSpecification
from ..client.slo import check_run_slo
from ..errors import UsageError
from ..inputs.corpora import describe as describe_text
from ..inputs.models import DEFAULT_MODEL, fingerprint, recorded_name, resolve_model

DENSE = "dense"
STOCK = "stock"
"""A server without the plugin: plain ``vllm serve`` under the same flags."""
_WITHOUT_SPARSITY = (DENSE, STOCK)
_KINDS = {
    **dict.fromkeys(("methods", "sparsity", "rates", "seeds"), list),
    **dict.fromkeys(("eviction", "server", "environment", "load", "slo"), dict),
}
_OF_THE_STUDY = ("kv_policy", "kv_sparsity", "kv_budget_tokens")
_NAMES = {list: "list", dict: "mapping"}


@dataclass(frozen=True)
class ServingStudy:
    """Methods x sparsities x rates x seeds; the keys of a study's YAML file."""

    model: str = DEFAULT_MODEL
    methods: tuple[Any, ...] = (DENSE, "h2o", "cab")
    """Names, or ``{policy: h2o, sparsity: [0.5], rates: [4, 5], seeds: [0, 1]}`` where a method
    has some of these for itself."""
    sparsity: tuple[float, ...] = (0.9,)
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
        for name in ("policy", "sparsity"):
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
            if run.method != STOCK:
                EvictionConfig.parse(self.settings(run.method, run.sparsity))

    def settings(self, method: str, sparsity: float) -> dict[str, Any]:
        """Eviction settings of a server: one policy, and no request may ask for another."""
        return {
            **self.eviction,
            "policy": method,
            "sparsity": sparsity,
            "request_policies": [],
        }

    def runs(self) -> list[ServingRun]:
        """Every run, one server's after the other."""
        found = []
        for entry in self.methods:
            own = self._own(entry)
            method = own["policy"]
            for sparsity in (0.0,) if method in _WITHOUT_SPARSITY else own["sparsity"]:
                value = parse_sparsity("sparsity", sparsity)
                for rate in own["rates"] or (None,):
                    if rate is not None and not (
                        type(rate) in (int, float) and 0 < rate < math.inf
                    ):
                        raise UsageError(f"rates has {rate!r}; give finite numbers above 0")
                    for seed in own["seeds"]:
                        if type(seed) is not int or seed < 0:
                            raise UsageError(f"seeds has {seed!r}; give whole numbers from 0 on")
                        found.append(ServingRun(self, method, value, rate, seed))
        return found

    def _own(self, entry: Any) -> dict[str, Any]:
        """A method's policy, sparsities, rates and seeds; the study's where it names none."""
        values = {name: getattr(self, name) for name in ("sparsity", "rates", "seeds")}
        if not isinstance(entry, Mapping):
            return {"policy": entry, **values}
        if "policy" not in entry or not entry.keys() <= {"policy", *values}:
            raise UsageError(
                f"method {dict(entry)} needs policy, and has sparsity, rates and seeds at most"
            )
        for name in values:
            if not isinstance(entry.get(name, []), list):
                raise UsageError(f"{name} of method {dict(entry)} must be a list")
        return {**values, **entry}


@dataclass(frozen=True)
class ServingRun:
    """One load on one server."""

    study: ServingStudy
    method: str
    sparsity: float
    rate: float | None
    seed: int

    @property
    def server_key(self) -> str:
        """Runs that share it share a server."""
        return f"{self.method}_s{self.sparsity:g}"

    @property
    def key(self) -> str:
        rate = "" if self.rate is None else f"_rate{self.rate:g}"
        return f"{self.server_key}{rate}"

    @property
    def file_name(self) -> str:
        return f"{self.key}_seed{self.seed}.json"

    @property
    def load(self) -> LoadSpecification:
        """The load: the study's, at this rate and seed."""
        own = {"seed": self.seed} | ({} if self.rate is None else {"request_rate": self.rate})
        return LoadSpecification.parse({**self.study.load, **own})

    def describe(self) -> dict[str, Any]:
        """What a record says about its run, with a hash that tells two apart."""
        study = self.study
        values = {
            "method": self.method,
            "sparsity": self.sparsity,
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
        text = json.dumps([values, self.load.to_dict()], sort_keys=True)
        return values | {"hash": hashlib.sha256(text.encode()).hexdigest()[:16]}

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
