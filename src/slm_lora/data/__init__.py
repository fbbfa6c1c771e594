"""From rows on a disk or a hub to token ids with a label mask."""
