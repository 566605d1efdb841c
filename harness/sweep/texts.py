"""Windows and prompts of a sweep's runs, each text tokenized once per model."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from ..inputs.corpora import load_documents, resolved_revision, resolved_split, skipped_note
from ..inputs.tasks.haystack import Haystack
from ..inputs.tasks.registry import Asked, draw_samples, read_samples
from ..inputs.tasks.sample import Sample
from ..inputs.text import Text
from ..inputs.tokens import encode, load_tokenizer, scored_text
from ..inputs.windows import ALL_WINDOWS, Window, draw_prompts, draw_windows, tile_windows
from ..study.specification import Answers, OfflineRun, Perplexity, Throughput


class Texts:
    """Everything ``runs`` read.

    Tokenizing goes on in a thread after construction: it holds no lock of Python's, so the
    caller's imports cost no time beside it. ``check`` waits for it.

    Raises:
        UsageError: a text or tokenizer cannot be had.

    """

    def __init__(self, runs: Sequence[OfflineRun]) -> None:
        self._runs = runs
        self._tokenizer = cache(load_tokenizer)
        self._source = cache(self._read_source)
        self._haystack = cache(self._read_haystack)
        self._samples = cache(self._draw_samples)
        self._skipped: dict[Text, int] = {}
        self._sizes: dict[tuple[int, ...], dict[str, int]] = {}
        self._documents: dict[tuple[str, Text], Future[list[list[int]]]] = {}
        # One worker: a tokenizer must not be used by two threads.
        worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")
        for run in runs:
            key = run.resource.model_path, run.measurement.text
            if key not in self._documents:
                documents = load_documents(run.measurement.text)
                self._skipped[run.measurement.text] = documents.skipped_rows
                self._documents[key] = worker.submit(
                    encode, self._tokenizer(key[0]), run.measurement.text.document_mode, documents
                )
        worker.shutdown(wait=False)

    @property
    def notes(self) -> list[str]:
        """A sentence for each text of which rows were left out."""
        return [skipped_note(text, count) for text, count in self._skipped.items() if count]

    def check(self) -> None:
        """Draw what every run reads.

        Raises:
            UsageError: a text is too short for a run, or a task cannot be asked.

        """
        for run in self._runs:
            if isinstance(run.measurement, Perplexity):
                self.windows(run)
            elif isinstance(run.measurement, Answers):
                self.samples(run)
            else:
                self.prompts(run)

    def windows(self, run: OfflineRun) -> list[Window]:
        """Windows of a perplexity run."""
        assert isinstance(run.measurement, Perplexity)
        number, length = run.measurement.num_samples, run.resource.context_length
        if isinstance(number, str):
            assert number == ALL_WINDOWS
            return tile_windows(self._tokens(run), length)
        return draw_windows(self._tokens(run), number, length, run.seed)

    def sizes(self, run: OfflineRun, windows: Sequence[Window]) -> list[dict[str, int]]:
        """``scored_text`` of each of a run's windows, decoded once for all methods."""
        assert isinstance(run.measurement, Perplexity)
        min_context = run.measurement.min_context
        tokenizer = self._tokenizer(run.resource.model_path)
        sizes = []
        for _, window in windows:
            key = (min_context, *window)
            if key not in self._sizes:
                self._sizes[key] = scored_text(tokenizer, window, min_context)
            sizes.append(self._sizes[key])
        return sizes

    def prompts(self, run: OfflineRun) -> list[list[int]]:
        """Prompts of a throughput run."""
        assert isinstance(run.measurement, Throughput)
        load = run.measurement.load
        return draw_prompts(self._tokens(run), load.num_requests, load.prompt_tokens, run.seed)

    def samples(self, run: OfflineRun) -> list[Sample]:
        """What a run of a task asks; the same for all methods."""
        assert isinstance(run.measurement, Answers)
        engine = run.resource
        return self._samples(engine.model_path, engine.context_length, run.measurement, run.seed)

    def source(self, run: OfflineRun) -> dict[str, Any]:
        """What the run's text was read from: hub commit and split, where it has them, and how
        many rows without text were left out."""
        return self._source(run.measurement.text)

    def any_window(self, run: OfflineRun) -> list[int]:
        """Tokens to warm an engine up with."""
        return draw_prompts(self._tokens(run), 1, run.resource.context_length // 2 + 1, 0)[0]

    def _tokens(self, run: OfflineRun) -> list[list[int]]:
        return self._documents[run.resource.model_path, run.measurement.text].result()

    def _read_source(self, text: Text) -> dict[str, Any]:
        return {
            "dataset_revision": resolved_revision(text),
            "dataset_split": resolved_split(text),
            "dataset_skipped_rows": self._skipped[text],
        }

    def _read_haystack(self, model_path: str, text: Text) -> Haystack:
        # All texts first: a tokenizer must not be used by two threads.
        documents = {key: future.result() for key, future in self._documents.items()}
        return Haystack(self._tokenizer(model_path), documents[model_path, text])

    def _draw_samples(
        self, model_path: str, context_length: int, measurement: Answers, seed: int
    ) -> list[Sample]:
        tokenizer = self._tokenizer(model_path)
        haystack = self._haystack(model_path, measurement.text)
        asked = Asked(
            measurement.num_samples,
            context_length,
            measurement.question,
            measurement.output_tokens or 1,
        )
        if measurement.task_path:
            return read_samples(Path(measurement.task_path), tokenizer, asked, seed)
        return draw_samples(measurement.task, tokenizer, haystack, asked, seed)
