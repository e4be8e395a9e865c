"""What becomes of reports: files, tables, pictures."""
