"""A study: settings of a sweep, from a YAML file and flags, and the runs they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vllm_plugins.config import EvictionConfig, parse_settings
from vllm_plugins.parsing import check_renamed
from vllm_plugins.platforms import FP8

from ..errors import UsageError
from ..inputs.corpora import DEFAULT_DATASET, DOCUMENT_MODES, has_rows
from ..inputs.models import DEFAULT_MODEL, recorded_name
from ..inputs.tasks.sample import AFTER, COMPUTED
from ..inputs.windows import ALL_WINDOWS
from .hypotheses import check_hypotheses, untestable
from .levels import method_for
from .points import check_given, check_known
from .specification import PROTOCOLS
from .tasks import check_tasks, tasks_need

_MAX_NAME_BYTES = 200
"""File systems allow 255; a partial file's name is longer than the file's."""
DTYPES = ("float32", "bfloat16", "float16", "auto")
KV_CACHE_DTYPES = ("auto", *sorted(FP8))
_NOT_VARIED = ("name", "vary", "tasks", "hypotheses")
_DEFAULTS = EvictionConfig()
EVICTION = (
    "granularity",
    "layer_groups",
    "score",
    "score_half_life",
    "score_queries",
    "score_query_stride",
    "score_prompt_stride",
    "score_layer_stride",
    "sink_blocks",
    "sink_tokens",
    "slack_tokens",
    "min_blocks",
    "policy_args",
)
"""Settings that are fields of ``EvictionConfig``, of every engine of a study."""
ALL_SCORES = {"score_query_stride": 1, "score_prompt_stride": 1, "score_layer_stride": 1}
"""The papers' score, every query and layer, whatever a server samples."""


@dataclass(frozen=True)
class Study:
    """Every setting of a sweep; the keys of a study's YAML file and, with dashes, the flags."""

    name: str | None = None
    model: str = DEFAULT_MODEL
    methods: tuple[Any, ...] = ("dense", "h2o", "cab")
    sparsity: tuple[Any, ...] = (0.5, 0.9)
    budget_tokens: tuple[int, ...] = ()
    dataset: str = DEFAULT_DATASET
    text_column: str | None = None
    document_mode: str = "concatenate"
    context_length: int = 1024
    min_context: int = 1
    num_samples: int | str = 8
    """Windows of a run; ``all``: those that tile the text."""
    num_runs: int | None = None
    seeds: tuple[int, ...] | None = None
    protocol: str = "chunked"
    prefill_chunk: int = 64
    block_size: int = 32
    max_num_seqs: int = 8
    kv_pool_windows: int | None = None
    enforce_eager: bool | None = None
    dtype: str | None = None
    """float32 on CPU (the reference's precision; many CPUs are slow in bfloat16), else auto."""
    kv_cache_dtype: str = "auto"
    """Of keys and values in the cache; auto: as ``dtype``."""
    perplexity: bool | None = None
    """None: where no tasks are named."""
    tasks: tuple[str, ...] = ()
    task_samples: int = 32
    task_question: str = AFTER
    task_prefix: str = COMPUTED
    task_output_tokens: int = 128
    throughput: bool = False
    load_runs: int | None = None
    load_requests: int | None = None
    load_output_tokens: int | None = None
    granularity: str = _DEFAULTS.granularity
    layer_groups: int = _DEFAULTS.layer_groups
    score: str = _DEFAULTS.score
    score_half_life: int = _DEFAULTS.score_half_life
    score_queries: Any = _DEFAULTS.score_queries
    score_query_stride: int = ALL_SCORES["score_query_stride"]
    score_prompt_stride: int = ALL_SCORES["score_prompt_stride"]
    score_layer_stride: int = ALL_SCORES["score_layer_stride"]
    sink_blocks: int = _DEFAULTS.sink_blocks
    sink_tokens: int = _DEFAULTS.sink_tokens
    slack_tokens: int = _DEFAULTS.slack_tokens
    min_blocks: int = _DEFAULTS.min_blocks
    policy_args: dict[str, Any] = field(default_factory=dict)
    hypotheses: tuple[Any, ...] = ()
    """What is tested, stated before it is measured (``hypotheses.Hypothesis``)."""
    vary: dict[str, Any] = field(default_factory=dict)
    """Setting to values: each combination is a comparison with a folder of its own."""

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> Study:
        """From untyped settings.

        Raises:
            UsageError: an unknown or misused setting, or one without a value.
                ``EvictionConfigError``: one of the plugin is wrong, or under its former name.

        """
        check_renamed(settings)
        check_known(settings, (f.name for f in fields(cls)), "a study")
        check_given(cls, settings, "a study")
        values = {**settings, **parse_settings({k: settings[k] for k in EVICTION if k in settings})}
        if not isinstance(values.get("vary", {}), Mapping):
            raise UsageError("vary must be a mapping of a setting to its values")
        if isinstance(values.get("dataset"), (list, tuple)):
            # Several texts are what varies first.
            vary = {k: v for k, v in values.get("vary", {}).items() if k != "dataset"}
            datasets = list(values.pop("dataset"))
            values["vary"] = {"dataset": datasets, **vary}
            if len(datasets) == 1:
                values["dataset"], values["vary"] = datasets[0], vary
        for name in ("methods", "sparsity", "budget_tokens", "seeds", "tasks", "hypotheses"):
            if values.get(name) is not None:
                value = values[name]
                values[name] = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        study = cls(**values)
        study._check()
        return study

    def _check(self) -> None:
        if self.name is not None:
            check_folder_name(self.name, "name")
        for name in (
            "num_samples",
            "context_length",
            "prefill_chunk",
            "max_num_seqs",
            "min_context",
            "kv_pool_windows",
            "num_runs",
            "load_runs",
            "load_requests",
            "load_output_tokens",
            "task_samples",
            "task_output_tokens",
        ):
            value = getattr(self, name)
            if name == "num_samples" and value == ALL_WINDOWS:
                continue
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value!r}")
        for name in ("perplexity", "throughput", "enforce_eager"):
            if getattr(self, name) not in (None, False, True):
                raise UsageError(f"{name} must be true or false, not {getattr(self, name)!r}")
        several = max(self.num_runs or 1, len(self.seeds or ()))
        if self.num_samples == ALL_WINDOWS and self.measures_perplexity and several > 1:
            raise UsageError(
                f"--num-samples {ALL_WINDOWS} takes the windows that tile the text, the same for "
                "every seed; give one seed, or a number of windows to draw"
            )
        check_hypotheses(self.hypotheses)
        if self.context_length < 2:
            raise UsageError("--context-length must be at least 2 tokens")
        if self.document_mode not in DOCUMENT_MODES:
            raise UsageError(f"--document-mode must be one of: {', '.join(DOCUMENT_MODES)}")
        if self.dtype not in (None, *DTYPES):
            raise UsageError(f"--dtype must be one of: {', '.join(DTYPES)}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise UsageError(f"--kv-cache-dtype must be one of: {', '.join(KV_CACHE_DTYPES)}")
        if self.protocol not in PROTOCOLS:
            raise UsageError(f"--protocol must be one of: {', '.join(PROTOCOLS)}")
        check_tasks(self)
        for method in self.methods:
            method_for(method)
        check_renamed(self.vary)
        for name, values in self.vary.items():
            if name in _NOT_VARIED or name not in {f.name for f in fields(self)}:
                raise UsageError(f"vary names {name!r}, which is no setting that can vary")
            if not isinstance(values, list) or not values:
                raise UsageError(f"vary.{name} must be a list of values")
        for name in ("model", "dataset", "text_column"):
            for value in (getattr(self, name), *self.vary.get(name, ())):
                named = isinstance(value, str) and value != ""
                if not named and (name != "text_column" or value is not None):
                    raise UsageError(f"{name} is {value!r}; give a name")

    @property
    def measures_perplexity(self) -> bool:
        """As asked for; of itself where no tasks are named."""
        return not self.tasks if self.perplexity is None else self.perplexity

    def without_effect(self) -> list[str]:
        """Settings that were given and change nothing, a sentence each."""
        given = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        given |= self.vary.keys()
        texts = self.vary.get("dataset", [self.dataset])
        needed = {
            "score_half_life": ("--score decay", self.score == "decay" or "score" in self.vary),
            "text_column": ("a --dataset of rows", any(map(has_rows, texts))),
        }
        methods = [method_for(method) for method in self.methods]
        chosen = [self.granularity, *self.vary.get("granularity", ())]
        chosen += [method.granularity for method in methods]
        by_token, by_block = (
            any(granularity not in (other, None) for granularity in chosen)
            for other in ("block", "token")
        )
        for name in ("sink_tokens", "slack_tokens"):
            needed[name] = ("--granularity token", by_token)
        for name in ("sink_blocks", "score_layer_stride"):
            needed[name] = ("--granularity block", by_block)
        for name in ("load_runs", "load_requests", "load_output_tokens"):
            needed[name] = ("--throughput", self.throughput or "throughput" in self.vary)
        needed |= tasks_need(self)
        return untestable(self.hypotheses, [method.name for method in methods]) + [
            f"--{name.replace('_', '-')} has no effect without {what}"
            for name, (what, there) in needed.items()
            if name in given and not there
        ]

    def to_dict(self) -> dict[str, Any]:
        """The settings as given, files without their folders."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        values["model"] = recorded_name(self.model)
        values["dataset"] = short_name(self.dataset)
        values["tasks"] = [short_name(name) for name in self.tasks]
        vary = dict(self.vary)
        if "dataset" in vary:
            vary["dataset"] = [short_name(name) for name in vary["dataset"]]
        if "model" in vary:
            vary["model"] = [recorded_name(name) for name in vary["model"]]
        return {**values, "vary": vary}


def read_study(path: Path) -> dict[str, Any]:
    """The settings of a YAML file.

    Raises:
        UsageError: no such file, or not a mapping.

    """
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read the study {path}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"{path} is no study; it must be a mapping of settings to values")
    return settings


def check_folder_name(name: Any, setting: str) -> str:
    """``name``, if it is that of one folder and leads nowhere else.

    Args:
        name: as given.
        setting: what the user calls it.

    Raises:
        UsageError: empty, ``.`` or ``..``, a path, too long, or no text at all.

    """
    plain = (
        isinstance(name, str)
        and name.strip() not in ("", ".", "..")
        and not any(c in "/\\" or not c.isprintable() for c in name)
        and len(name.encode("utf-8", "replace")) <= _MAX_NAME_BYTES
    )
    if not plain:
        raise UsageError(
            f"{setting} is {name!r:.60}; give the plain name of a folder, without "
            f"slashes and of at most {_MAX_NAME_BYTES} bytes (--output-dir says where it goes)"
        )
    return name


def short_name(dataset: str) -> str:
    """``text:/a/b.txt`` -> ``text:b.txt``; other names stay."""
    kind, colon, path = dataset.partition(":")
    return f"{kind}:{Path(path).name}" if colon else dataset
