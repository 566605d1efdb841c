"""Which requests run at a time, so that none is ever alone with a prompt. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def waves(steps: Sequence[int], size: int) -> list[tuple[list[int], bool]]:
    """Requests of different lengths in waves, longest prompts first.

    vLLM gives a request that is alone in the engine its whole token budget as a chunk
    (scheduler.py, long_prefill_token_threshold). Answers are of different lengths, so that the
    others of a wave may have ended before its longest prompt is computed. In each wave two
    requests have the longest prompt: the second one of the wave, or a companion.

    Args:
        steps: of each request, the chunks of its prompt.
        size: requests of a wave at most, companions included; at least 2.

    Returns:
        Places of each wave's requests, and whether its first one needs a companion.

    """
    order = sorted(range(len(steps)), key=lambda i: -steps[i])
    made = []
    while order:
        longest = steps[order[0]]
        alone = longest > 1 and (len(order) == 1 or steps[order[1]] < longest)
        count = size - 1 if alone else size
        made.append((order[:count], alone))
        order = order[count:]
    return made
