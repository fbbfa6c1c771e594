"""The training loop and what it needs: loss, attention, optimizer."""
