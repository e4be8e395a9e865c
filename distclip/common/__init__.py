"""What every room may use: foreign text, host copies, tested versions, numbers of a report."""
