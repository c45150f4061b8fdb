"""One module per command. Its docstring is the command's grammar; its `prepare` returns the function to run."""
