"""How fast a model runs here, beside what others make of the same weights: the parts of `mobilellm bench`."""
