"""A base and its adapters behind a page and an OpenAI-style API, in one process."""
