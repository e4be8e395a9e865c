"""Running a script in this process as ``python`` would, and leaving it cleanly."""
