"""The commands, one module for each.

A module's docstring is the command's grammar and its help text. A module's function `prepare` checks the words of a
command line, and returns the function that runs the command; it raises CalicoError if the words are invalid.
"""
