"""Windows and prompts of a sweep's runs, each text tokenized once per model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from .corpora import resolved_revision
from .specification import RunSpecification, Text
from .tokens import load_tokenizer, tokenize
from .workload import Window, draw_prompts, draw_windows


class Texts:
    """Everything ``runs`` read.

    Raises:
        UsageError: a text cannot be had, or is too short for a run.

    """

    def __init__(self, runs: Sequence[RunSpecification]) -> None:
        self.tokenizer = cache(load_tokenizer)
        self._revision = cache(resolved_revision)
        self._documents: dict[tuple[str, Text], list[list[int]]] = {}
        for run in runs:
            if run.load is None:
                self.windows(run)
            else:
                self.prompts(run)

    def windows(self, run: RunSpecification) -> list[Window]:
        """Windows of a perplexity run."""
        return draw_windows(self._tokens(run), run.num_samples, run.engine.context_length, run.seed)

    def prompts(self, run: RunSpecification) -> list[list[int]]:
        """Prompts of a throughput run."""
        assert run.load is not None
        return draw_prompts(
            self._tokens(run), run.load.num_requests, run.load.prompt_tokens, run.seed
        )

    def revision(self, run: RunSpecification) -> str | None:
        """The hub commit that the run's text was read at, where it came from the hub."""
        return self._revision(run.text)

    def any_window(self, run: RunSpecification) -> list[int]:
        """Tokens to warm an engine up with."""
        return draw_prompts(self._tokens(run), 1, run.engine.context_length // 2 + 1, 0)[0]

    def _tokens(self, run: RunSpecification) -> list[list[int]]:
        key = run.engine.model_path, run.text
        if key not in self._documents:
            self._documents[key] = tokenize(self.tokenizer(run.engine.model_path), run.text)
        return self._documents[key]
