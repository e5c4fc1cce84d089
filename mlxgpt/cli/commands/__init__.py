"""One module per command: its arguments, and a function that runs it and prints the result."""
