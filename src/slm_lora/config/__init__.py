"""Configuration of an experiment: its schema, the reader of YAML files, the grid of cells."""
