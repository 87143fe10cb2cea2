"""Benchmarks that check before they time: `exssnet bench`. This folder is the package exssnet.bench."""
