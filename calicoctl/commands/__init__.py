"""One module per word after `calicoctl`: its docstring is its grammar, `run` does what was asked."""
