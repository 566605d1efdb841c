"""The benchmark: what eviction costs in perplexity, and what it buys in memory and speed."""
