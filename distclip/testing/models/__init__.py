"""Models cut in every way, with gradients that the oracle knows whole."""
