"""The command line: one module per command, and what is drawn in the terminal."""
