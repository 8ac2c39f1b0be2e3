"""The model in torch: forward pass, cache, generation, and checkpoints of every known layout."""
