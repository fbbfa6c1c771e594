"""From rows on disk or on the hub to token ids with a response mask."""
