"""Values, files and the terminal, by the standard library and PyYAML alone: every other package may import this one."""
