"""Scores of held-out rows, and generated replies."""
