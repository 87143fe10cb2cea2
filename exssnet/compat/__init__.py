"""Adapters for other frameworks. Each module needs its framework, which it imports; this package imports none."""
