"""A bench study: loads on engines of their own, stock vLLM against eviction; from a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vllm_plugins.config import EvictionConfig

from ..client.checks import check_json, check_numbers
from ..errors import UsageError
from ..inputs.models import DEFAULT_MODEL, fingerprint, recorded_name, resolve_model
from ..records.specifications import DENSE, STOCK
from .batch_specification import Batch, BatchEngineSpecification
from .bench_load import BenchLoad, BenchRun, parse_load
from .levels import levels_for
from .own_settings import own_settings
from .points import (
    Comparison,
    check_file_names,
    check_seeds,
    check_vary,
    eviction_settings,
    points_of,
    typed_settings,
)
from .run import Budget, Method, Run
from .settings import check_folder_name, read_study
from .steady_load import SteadyLoad

_OF_A_METHOD = ("sparsity", "budget_tokens", "seeds")
_LAID_OVER = ("eviction", "engine", "load")
"""Mappings that a method may bring; they are laid over the study's."""
_KINDS = {
    **dict.fromkeys(("methods", *_OF_A_METHOD), list),
    **dict.fromkeys(("eviction", "engine", "environment", "load", "vary"), dict),
}
_MAX_LOGPROBS = 20
"""vLLM's own (``vllm/config/model.py``)."""
_OURS = (
    "model",
    "block_size",
    "enable_prefix_caching",
    "kv_transfer_config",
    "scheduler_cls",
    "logits_processors",
    "disable_log_stats",
)
"""Engine arguments that follow from other settings."""


@dataclass(frozen=True)
class BenchStudy:
    """Methods x sparsities x seeds; the keys of a study's YAML file."""

    name: str | None = None
    """Of the study's folder; None: the file's."""
    model: str = DEFAULT_MODEL
    methods: tuple[Any, ...] = (STOCK, "h2o", "cab")
    """Names, or ``{policy: h2o, name: h2o-all, args: {}, sparsity: [0.9], budget_tokens: [1024],
    seeds: [0], eviction: {score_query_stride: 1}, engine: {kv_cache_dtype: fp8},
    load: {prompt_tokens: 26}, start: 2, prefix_caching: true}`` with some of these."""
    sparsity: tuple[float, ...] = (0.9,)
    budget_tokens: tuple[int, ...] = ()
    """Absolute budgets, beside the sparsities."""
    seeds: tuple[int, ...] = (0,)
    """Repeats: each has prompts of its own, the same for every method."""
    rounds: bool = False
    """Engines start anew for each seed, so that slow changes of the machine meet all methods
    alike; else all seeds of an engine run in one start."""
    prefix_caching: bool = False
    """Whether prefixes are cached and shared, by stock vLLM and by the plugin."""
    block_size: int = 32
    eviction: dict[str, Any] = field(default_factory=dict)
    """Server-wide eviction settings; those of a method are laid over them."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Engine arguments of vLLM, names with underscores; those of a method are laid over them."""
    environment: dict[str, str] = field(default_factory=dict)
    startup_timeout_s: float = 600.0
    batch_timeout_s: float = 3600.0
    load: dict[str, Any] = field(default_factory=dict)
    """Fields of ``Batch``; with ``kind: steady`` those of ``SteadyLoad``. Those of a method are
    laid over them."""
    vary: dict[str, list[Any]] = field(default_factory=dict)
    """Setting to values, like ``load.num_requests``: each combination is a table of its own."""

    @classmethod
    def read(cls, path: Path) -> BenchStudy:
        """Read and check a study.

        Raises:
            UsageError: no such file, not YAML, or a setting is wrong.

        """
        return cls.parse(read_study(path))

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> BenchStudy:
        """From untyped settings."""
        study = cls(**typed_settings(values, cls, _KINDS, "a bench study"))
        study._validate()
        return study

    def points(self, folder: Path) -> list[Comparison]:
        """The runs of each point of ``vary``, and the folder of their records."""
        return points_of(self, folder)

    def runs(self) -> list[BenchRun]:
        """Every run, one seed's after the other; those of ``vary`` apart."""
        path = resolve_model(self.model)
        model = {"model": recorded_name(self.model), "model_fingerprint": fingerprint(path)}
        sides: list[tuple[int, BenchRun]] = []
        for entry in self.methods:
            own = own_settings(entry, vars(self), _OF_A_METHOD)
            entry, brought = _split(own["method"])
            load = parse_load(self.load, brought.get("load"))
            levels = levels_for([entry], own["sparsity"], own["budget_tokens"])
            for method, budget in levels:
                server_wide = _is_beams(load) and method.policy != STOCK
                settings = _server_wide(method, budget) if server_wide else {"policy": DENSE}
                engine = BatchEngineSpecification(
                    **model,
                    block_size=self.block_size,
                    eviction=self._eviction(method.policy, brought, settings),
                    arguments={**self.engine, **brought.get("engine", {})},
                    environment={name: str(value) for name, value in self.environment.items()},
                    start=brought.get("start", 1),
                    rounds=self.rounds,
                    prefix_caching=brought.get("prefix_caching", self.prefix_caching),
                    startup_timeout_s=self.startup_timeout_s,
                    batch_timeout_s=self.batch_timeout_s,
                    model_path=path,
                )
                for place, seed in enumerate(check_seeds(own["seeds"])):
                    sides.append((place, Run(engine, method, budget, seed, load)))
        return [run for _, run in sorted(sides, key=lambda side: side[0])]

    def to_dict(self) -> dict[str, Any]:
        """The settings as given, files without their folders."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "model": recorded_name(self.model)}

    def _validate(self) -> None:
        if not self.methods or not self.seeds:
            raise UsageError("a bench study needs at least one of methods and one of seeds")
        if self.name is not None:
            check_folder_name(self.name, "name")
        check_numbers(
            type(self), {k: v for k, v in vars(self).items() if k != "name" or v is not None}
        )
        for name in ("rounds", "prefix_caching"):
            if type(getattr(self, name)) is not bool:
                raise UsageError(f"{name} is {getattr(self, name)!r}; give true or false")
        if self.block_size < 1:
            raise UsageError(f"block_size is {self.block_size}; give at least 1")
        for name in ("startup_timeout_s", "batch_timeout_s"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name):g}; give a number above 0")
        for name in ("engine", "environment"):
            check_json(name, getattr(self, name))
        runs = self.runs()
        check_file_names(runs)
        for run in runs:
            _check_run(run)
        can_vary = _KINDS.keys() | {"block_size", "model", "prefix_caching", "rounds"}
        check_vary(self.vary, can_vary - {"vary"})

    def _eviction(
        self, policy: str, brought: Mapping[str, Any], chosen: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Settings of a method's engine. ``chosen``: its own policy and budget, where requests do
        not choose theirs themselves."""
        if policy == STOCK:
            if "eviction" in brought:
                raise UsageError("method stock is vLLM without the plugin; drop its eviction")
            return None
        laid = {**self.eviction, **brought.get("eviction", {})}
        for name in ("policy", "sparsity", "budget_tokens"):
            if name in laid:
                raise UsageError(f"eviction.{name} is set by methods and sparsity; remove it")
        arguments = {**laid.get("policy_args", {}), **chosen.get("policy_args", {})}
        own = {**laid, **chosen, **({"policy_args": arguments} if arguments else {})}
        return EvictionConfig.parse(own).to_dict()


def _is_beams(load: BenchLoad) -> bool:
    return isinstance(load, Batch) and load.beam_width > 1


def _server_wide(method: Method, budget: Budget) -> dict[str, Any]:
    """A method as settings of a server."""
    settings: dict[str, Any] = {"policy": method.policy}
    if method.args:
        settings["policy_args"] = {method.policy: method.args}
    if method.granularity is not None:
        settings["granularity"] = method.granularity
    if budget.tokens is not None:
        return {**settings, "budget_tokens": budget.tokens}
    return {**settings, "sparsity": budget.sparsity}


def _split(entry: Any) -> tuple[Any, dict[str, Any]]:
    """A method as ``levels_for`` takes it, and what it brings: of its engine, and of its load."""
    if not isinstance(entry, Mapping):
        return entry, {}
    names = (*_LAID_OVER, "start", "prefix_caching")
    own = {name: entry[name] for name in names if name in entry}
    for name in _LAID_OVER:
        if not isinstance(own.get(name, {}), dict):
            raise UsageError(f"{name} of method {dict(entry)} must be a mapping")
    start = own.get("start", 1)
    if type(start) is not int or start < 1:
        raise UsageError(f"start of method {dict(entry)} must be a whole number of at least 1")
    if type(own.get("prefix_caching", False)) is not bool:
        raise UsageError(f"prefix_caching of method {dict(entry)} must be true or false")
    if "eviction" in own:
        own["eviction"] = eviction_settings(own["eviction"])
    for name in own:
        check_json(f"{name} of a method", own[name])
    return {k: v for k, v in entry.items() if k not in own}, own


def _check_run(run: BenchRun) -> None:
    """Refuse what the engine or the plugin would refuse, before one starts."""
    engine, load = run.resource, run.measurement
    if ours := [name for name in _OURS if name in engine.arguments]:
        raise UsageError(
            f"engine.{ours[0]} follows from other settings of a bench study; remove it"
        )
    longest = load.max_tokens
    length = engine.arguments.get("max_model_len")
    if type(length) is int and longest > length:
        raise UsageError(
            f"a request of the load has {longest} tokens at its end, more than "
            f"engine.max_model_len {length}; raise the one or lower the other"
        )
    if isinstance(load, SteadyLoad):
        _check_steady(load, engine)
    elif load.beam_width > 1:
        _check_beams(load, engine)
    if engine.eviction is not None:
        config = EvictionConfig.parse(engine.eviction)
        config.request_settings(run.settings, engine.block_size)


def _check_beams(load: Batch, engine: BatchEngineSpecification) -> None:
    if engine.arguments.get("skip_tokenizer_init"):
        raise UsageError(
            "vLLM's beam search asks for a tokenizer; drop engine.skip_tokenizer_init, or "
            "load.beam_width"
        )
    most = engine.arguments.get("max_logprobs", _MAX_LOGPROBS)
    if type(most) is int and 0 <= most < 2 * load.beam_width:
        raise UsageError(
            f"load.beam_width is {load.beam_width}, and beam search asks for two log-probs a "
            f"beam, more than engine.max_logprobs {most}; raise the one or lower the other"
        )


def _check_steady(load: SteadyLoad, engine: BatchEngineSpecification) -> None:
    if engine.prefix_caching:
        raise UsageError("prefix_caching is for batches; prompts of a steady load share nothing")
    most = engine.arguments.get("max_num_seqs")
    if type(most) is int and load.num_sequences > most:
        raise UsageError(
            f"load.num_sequences is {load.num_sequences}, more than engine.max_num_seqs {most}; "
            "raise the one or lower the other"
        )
    seconds = load.settle_seconds + load.measured_seconds
    if seconds >= engine.batch_timeout_s:
        raise UsageError(
            f"load.settle_seconds and load.measured_seconds come to {seconds:g}, not less than "
            f"batch_timeout_s {engine.batch_timeout_s:g}; raise the one or lower the others"
        )
