"""Benchmarks, run by `exssnet bench`. Results are checked before they are timed. The package is `exssnet.bench`."""
