"""Base models: resolution, loading, the forward pass, the output head."""
