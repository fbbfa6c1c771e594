"""Statistics over finished runs: estimates, intervals, comparisons, power. No torch."""
