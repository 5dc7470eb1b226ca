"""One module per published two-timescale system."""
