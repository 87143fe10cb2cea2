"""The commands of ``exssnet``: arguments, messages, tables and progress. A command starts in `exssnet.io.console`."""
