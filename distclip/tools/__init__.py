"""Programs around clipping, behind the command line: launch, simulate, verify, measure."""
