"""Configuration of an experiment: schema, YAML loader, validation, grid expansion."""
