"""What clipping does on thousands of ranks: traced without hardware, and modelled from that."""
