"""The training loop: steps, optimizer, schedule, checkpoints."""
