"""Gloo ranks on this machine: warm processes, calls to them, and what came back."""
