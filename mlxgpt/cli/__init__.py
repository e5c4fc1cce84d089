"""The command line: argument parsing, one module per command, and terminal output."""
