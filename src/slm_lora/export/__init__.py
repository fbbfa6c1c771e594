"""Trained models for other programs: merged folders, GGUF, Ollama, the hub."""
