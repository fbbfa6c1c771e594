"""Run folders on disk. Training writes them, statistics and reports read them; no torch."""
