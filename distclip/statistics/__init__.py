"""Local norms, packed into one all-reduce."""
