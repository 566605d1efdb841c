"""Benchmarks of the plugin's own cost. Each runs all its sides in one go and keeps raw records."""
