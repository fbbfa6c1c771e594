"""What an experiment is: the schema, how it is read, how its grid unfolds."""
