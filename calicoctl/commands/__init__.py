"""One module per command: its docstring is its grammar, and `prepare` returns the function that runs it."""
