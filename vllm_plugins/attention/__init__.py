"""Compaction and scoring around the platform's own attention backend."""
