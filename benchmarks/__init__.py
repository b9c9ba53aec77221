"""Benchmarks of the DSTS module: ``pytest benchmarks/ --benchmark-only`` from the repository root."""
