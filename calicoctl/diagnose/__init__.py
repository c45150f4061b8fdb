"""Diagnosis of the host, the store and the policy. Only repairs that the user asks for change anything."""
