"""Values, files and the terminal. It needs only the standard library and PyYAML, and every package may import it."""
