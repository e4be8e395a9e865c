"""Clipping in training loops that others wrote: a file per framework, and torch's own loops."""
