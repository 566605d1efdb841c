"""What is sent and when: from a specification and a tokenizer, no clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..inputs.windows import Window, draw_windows
from .arrivals import send_times
from .lengths import Lengths
from .load_settings import LoadSpecification
from .traces import MOONCAKE_BLOCK, TraceEntry, read_trace, replay

LOAD = "load"
QUALITY = "quality"


@dataclass(frozen=True)
class PlannedRequest:
    """One request before it is sent."""

    index: int
    kind: str
    send_at: float | None
    """Seconds from the start; None in a closed loop: as soon as there is room."""
    prompt: list[int]
    output_length: int
    window: int | None = None
    """Index among the quality windows."""


@dataclass(frozen=True)
class Plan:
    """A whole load. ``windows``: (first token's index, tokens) of the quality windows."""

    requests: list[PlannedRequest]
    windows: list[Window]


def make_plan(
    specification: LoadSpecification,
    vocabulary_size: int,
    tokens_of: Callable[[str], list[int]],
    max_model_len: int | None = None,
) -> Plan:
    """Every request of a load.

    Args:
        specification: of the load.
        vocabulary_size: random token ids lie below it.
        tokens_of: dataset name to its tokens; called only where a text is needed.
        max_model_len: the server's; a request that cannot fit is refused here.

    Raises:
        UsageError: the specification cannot be met, or its steady figures would be empty; the
            message says what to change.

    """
    s = specification
    entries = _trace(s, max_model_len) if s.trace else None
    if s.arrivals == "closed":
        times: list[float | None] = [None] * s.num_requests
    elif s.arrivals == "trace":
        times = [entry.seconds for entry in entries or ()]
    else:
        times = send_times(
            s.arrivals,
            s.num_requests,
            s.request_rate,
            burstiness=s.burstiness,
            end_rate=s.ramp_to,
            seed=s.seed,
        ).tolist()
    rng = np.random.default_rng([s.seed, 1])
    quality = _quality_places(s, rng)
    windows: list[Window] = []
    if quality:
        count = min(s.quality.num_windows, len(quality))
        text = tokens_of(s.quality.dataset)
        windows = draw_windows([text], count, s.quality.context_length, s.seed)
    prompts = _Prompts(s, vocabulary_size, tokens_of, entries, np.random.default_rng([s.seed, 2]))
    requests = []
    for index, send_at in enumerate(times):
        if index in quality:
            window = quality[index] % len(windows)
            request = PlannedRequest(index, QUALITY, send_at, windows[window][1], 1, window)
        else:
            prompt, output_length = prompts.draw(index)
            request = PlannedRequest(index, LOAD, send_at, prompt, output_length)
        _check_fits(request, max_model_len)
        requests.append(request)
    _check_steady(s, requests)
    return Plan(requests, windows)


def _check_steady(s: LoadSpecification, requests: Sequence[PlannedRequest]) -> None:
    """Refuse an open loop that sends nothing between warm-up and cool-down.

    A closed loop's times are known afterwards only: there its record warns.
    """
    times = [r.send_at for r in requests if r.send_at is not None]
    if not times or not (s.warm_up_s or s.cool_down_s):
        return
    last = max(times)
    end = last - s.cool_down_s if s.cool_down_s else last
    steady = [r for r in requests if r.kind == LOAD and s.warm_up_s <= (r.send_at or 0.0) <= end]
    if not steady:
        raise UsageError(
            f"--warm-up {s.warm_up_s:g} and --cool-down {s.cool_down_s:g} leave no request for the "
            f"steady figures: the last is sent after {last:.1f} s; lower them, or send more"
        )


def _trace(s: LoadSpecification, max_model_len: int | None) -> list[TraceEntry]:
    assert s.trace is not None
    limit = s.max_tokens or max_model_len
    return replay(read_trace(Path(s.trace)), s.num_requests, s.time_scale, limit)


def _quality_places(s: LoadSpecification, rng: np.random.Generator) -> dict[int, int]:
    """Request index to running number, spread evenly: one in each of equal stretches."""
    count = round(s.quality.share * s.num_requests)
    if s.quality.share and not count:
        raise UsageError(
            f"--quality-share {s.quality.share:g} of {s.num_requests} requests is none; raise it"
        )
    edges = np.linspace(0, s.num_requests, count + 1).astype(int)
    return {
        int(rng.integers(low, high)): number for number, (low, high) in enumerate(pairwise(edges))
    }


class _Prompts:
    """Prompt and output length of one request after the other."""

    def __init__(
        self,
        s: LoadSpecification,
        vocabulary_size: int,
        tokens_of: Callable[[str], list[int]],
        entries: Sequence[TraceEntry] | None,
        rng: np.random.Generator,
    ) -> None:
        self._s, self._rng, self._vocabulary_size = s, rng, vocabulary_size
        self._entries = entries if s.prompts == "trace" else None
        self._text = tokens_of(s.dataset) if s.prompts == "text" else None
        self._inputs = Lengths.parse(s.input_length).draw(s.num_requests, rng)
        self._outputs = Lengths.parse(s.output_length).draw(s.num_requests, rng)
        groups = s.shared_prefix_groups if s.shared_prefix_length else 0
        self._prefixes = [self._tokens(s.shared_prefix_length) for _ in range(groups)]

    def draw(self, index: int) -> tuple[list[int], int]:
        """Token ids of a prompt (its shared prefix comes on top of its length), output length."""
        if self._entries is not None:
            entry = self._entries[index]
            return self._from_trace(entry), max(1, entry.output_length)
        prefix = self._prefixes[index % len(self._prefixes)] if self._prefixes else []
        return prefix + self._tokens(self._inputs[index]), self._outputs[index]

    def _from_trace(self, entry: TraceEntry) -> list[int]:
        if not entry.hash_ids:
            return self._tokens(entry.input_length)
        tokens: list[int] = []
        for hash_id in entry.hash_ids:
            block = np.random.default_rng([self._s.seed, 3, hash_id])
            tokens += block.integers(0, self._vocabulary_size, size=MOONCAKE_BLOCK).tolist()
        return tokens[: entry.input_length] + self._tokens(entry.input_length - len(tokens))

    def _tokens(self, length: int) -> list[int]:
        if length <= 0:
            return []
        if self._text is None:
            return self._rng.integers(0, self._vocabulary_size, size=length).tolist()
        if length > len(self._text):
            raise UsageError(
                f"{self._s.dataset} has {len(self._text):,} tokens, fewer than a prompt of "
                f"{length:,}"
            )
        start = int(self._rng.integers(0, len(self._text) - length + 1))
        return self._text[start : start + length]


def _check_fits(request: PlannedRequest, max_model_len: int | None) -> None:
    needed = len(request.prompt) + request.output_length
    if max_model_len is not None and needed > max_model_len:
        raise UsageError(
            f"request {request.index} has {len(request.prompt):,} prompt and "
            f"{request.output_length:,} output tokens, more than the server's max_model_len "
            f"{max_model_len:,}; lower the lengths, or use --max-tokens with a trace"
        )
