"""Rules: their text, and what they mean for one packet."""
