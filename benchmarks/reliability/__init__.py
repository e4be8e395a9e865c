"""Faults injected on purpose: how often, and what came of each. See docs/reliability.md."""
