"""Checkpoints: a run at any step, or a finished model, in one safetensors file with a checksum.

A file that is damaged or incomplete is refused.
"""

from .format import Meta, describe, header, load, load_run, read, save, save_run, versions

__all__ = ["Meta", "describe", "header", "load", "load_run", "read", "save", "save_run", "versions"]
