"""Changing gradients in place, and acting around the optimizer's step."""
