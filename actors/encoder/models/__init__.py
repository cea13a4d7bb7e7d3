"""Models that make one vector of a sequence."""
