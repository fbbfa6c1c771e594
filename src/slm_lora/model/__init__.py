"""From a model name to a frozen base with an adapter on it."""
