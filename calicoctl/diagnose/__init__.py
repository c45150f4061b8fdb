"""Diagnosis of the host, the store and the policy. Changes nothing, except for repairs that the user requests."""
