"""Serving: a patched ``vllm serve``, a load generator for it, and sweeps over both.

Data flows one way: specification -> plan (who is sent when) -> client (raw results) ->
summary (pure) -> record. Memory is sampled beside it, on the same clock.
"""
