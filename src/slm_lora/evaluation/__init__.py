"""Scoring of held-out rows, and text generation."""
