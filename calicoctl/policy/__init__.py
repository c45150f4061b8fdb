"""Policy rules: parsing, validation, and the verdict for one packet."""
