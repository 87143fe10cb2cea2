"""Checkpoints: a run at any step, or a finished model, in one safetensors file that is read whole or refused."""

from .format import Meta, describe, header, load, load_run, read, save, save_run, versions

__all__ = ["Meta", "describe", "header", "load", "load_run", "read", "save", "save_run", "versions"]
