"""The commands of ``exssnet``. The command itself starts in `exssnet.io.console`."""
