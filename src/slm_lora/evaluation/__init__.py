"""Held-out loss and perplexity, row by row."""
