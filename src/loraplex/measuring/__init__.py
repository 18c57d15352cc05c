"""What every measurement shares: clocks and percentiles, the machine's limits, memory, and how reports are written."""
