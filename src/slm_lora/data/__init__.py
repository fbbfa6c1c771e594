"""Load rows from disk or the hub, and turn them into token ids with a response mask."""
