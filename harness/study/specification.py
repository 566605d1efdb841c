"""What an offline run is measured on, and what is measured there."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from ..inputs.tasks.registry import GENERATED
from ..inputs.text import Text
from ..records.specifications import PERPLEXITY, TASK, THROUGHPUT
from .points import slug
from .run import Run, without_defaults

PROTOCOLS = ("chunked", "decode")


@dataclass(frozen=True)
class EngineSpecification:
    """What one engine is started with; runs that share it share the engine.

    ``model_path`` is where the model lies on this machine: no part of records and hashes.
    """

    model: str
    """Embedded name, folder's name, or hub id."""
    model_fingerprint: str
    """Tells two models of one name apart: hash of the configuration and the weights' sizes."""
    context_length: int
    prefill_chunk: int
    block_size: int
    max_num_seqs: int
    kv_pool_windows: int
    """The pool holds so many whole windows; as many are scored at a time."""
    enforce_eager: bool
    dtype: str = "float32"
    """Of weights and activations; ``auto`` is the checkpoint's own."""
    protocol: str = "chunked"
    eviction: dict[str, Any] = field(default_factory=dict)
    """Server-wide fields of ``EvictionConfig``, complete."""
    kv_cache_dtype: str = "auto"
    """Of keys and values in the cache, in vLLM's words; ``auto`` is that of the activations."""
    prefix_caching: bool = False
    """Blocks of prompts are cached, and a dense request computes a task's prompt before it is
    answered. Windows that are scored are computed all the same: vLLM reads no cache for them."""
    model_path: str = field(default="", compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As records have it: what does not differ between machines, and as in older records."""
        values = asdict(self)
        del values["model_path"]
        return without_defaults(values, {"kv_cache_dtype": "auto", "prefix_caching": False})

    @property
    def max_num_batched_tokens(self) -> int:
        """A chunk of every window in flight fits into one step."""
        return max(self.prefill_chunk * self.kv_pool_windows, self.max_num_seqs)

    @property
    def min_blocks(self) -> int:
        """So many blocks of a window stay, whatever its sparsity."""
        return self.eviction["min_blocks"]


@dataclass(frozen=True)
class Load:
    """A saturating offline load: all requests are there at the start."""

    num_requests: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class _OfText:
    """A measurement that reads a text and takes whole windows."""

    text: Text

    @property
    def key_suffix(self) -> str:
        return ""

    @property
    def answer_tokens(self) -> int:
        """The most that are decoded one by one after a prompt; 0: none that count."""
        return 0

    def request_tokens(self, engine: EngineSpecification) -> int | None:
        return engine.context_length

    def _stored(self, run: OfflineRun, **own: Any) -> dict[str, Any]:
        """What all such runs are specified by, and what a measurement has of its ``own``."""
        text = asdict(self.text)
        text.pop("dataset_path", None)
        return {
            "dataset": self.text.dataset,
            "engine": run.resource.to_dict(),
            "method": run.method.to_dict(),
            "text": text,
            "seed": run.seed,
            "sparsity": run.budget.sparsity,
            "budget_tokens": run.budget.tokens,
            **own,
        }


@dataclass(frozen=True)
class Perplexity(_OfText):
    """Log-probs of known windows."""

    num_samples: int | str
    """Windows; ``ALL_WINDOWS``: those that tile the text."""
    min_context: int = 1
    """First token of a window that is scored."""

    @property
    def kind(self) -> str:
        return PERPLEXITY

    def file_suffix(self, run: OfflineRun) -> str:
        return f"_ctx{run.resource.context_length}_seed{run.seed}"

    def stored(self, run: OfflineRun) -> dict[str, Any]:
        return self._stored(
            run, num_samples=self.num_samples, min_context=self.min_context, load=None
        )


@dataclass(frozen=True)
class Throughput(_OfText):
    """Speed under a saturating load of prompts from a text; no log-probs."""

    load: Load

    @property
    def kind(self) -> str:
        return THROUGHPUT

    def file_suffix(self, run: OfflineRun) -> str:
        return f"_ctx{run.resource.context_length}_load{run.seed}"

    def stored(self, run: OfflineRun) -> dict[str, Any]:
        return self._stored(run, num_samples=0, min_context=1, load=asdict(self.load))


@dataclass(frozen=True)
class Answers(_OfText):
    """Answers of a task, and what they score."""

    task: str
    """Its name; ``jsonl:FILE`` without the folder."""
    num_samples: int
    question: str
    """Where it stands: ``after`` the text, or ``before`` it too."""
    output_tokens: int | None = None
    """Of an answer; None: the task says."""
    sha256: str | None = None
    """Of a file's content."""
    longest_answer: int | None = field(default=None, compare=False)
    """Tokens that a line of a file asks for at most; what the file's hash says already."""
    task_path: str = field(default="", compare=False)
    """Where a file lies on this machine: no part of records and hashes."""

    @property
    def kind(self) -> str:
        return TASK

    @property
    def asked(self) -> dict[str, Any]:
        """What is asked, as the specification has it under ``task``."""
        return {"name": self.task, "output_tokens": self.output_tokens, "sha256": self.sha256}

    @property
    def answer_tokens(self) -> int:
        if self.longest_answer is not None:
            return min(self.longest_answer, 2)  # the longest prompt may have a short answer
        own = GENERATED.get(self.task)
        return own.max_tokens if own else self.output_tokens or 0

    def file_suffix(self, run: OfflineRun) -> str:
        # A dash for each underscore: no name of a task makes a record look like another kind's.
        return f"_ctx{run.resource.context_length}_task{run.seed}_{slug(self.task)}"

    def request_tokens(self, engine: EngineSpecification) -> int | None:
        return None if self.sha256 else engine.context_length

    def stored(self, run: OfflineRun) -> dict[str, Any]:
        return self._stored(
            run, task=self.asked, num_samples=self.num_samples, question=self.question
        )


OfflineRun: TypeAlias = Run[EngineSpecification, Perplexity | Throughput | Answers]
