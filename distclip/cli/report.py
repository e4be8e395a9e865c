def report(run: str) -> None:
    """x"""
