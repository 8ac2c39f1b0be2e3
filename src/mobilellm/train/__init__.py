"""One training loop: batches, loss, optimiser, schedule, checkpoints that resume exactly."""
