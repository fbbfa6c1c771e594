"""A web page and an OpenAI-compatible API for a base and its adapters, in one process."""
