"""A conversation with a model, and the terminal it is held in."""
