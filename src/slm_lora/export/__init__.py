"""Hands what was trained to other programs: merged models, GGUF, the hub."""
