"""One clipping step: compiled passes, and the walk through them; what the ranks agree on; state."""
