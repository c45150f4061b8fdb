"""Policy rules: their text, and their verdict for one packet."""
