"""What a model is worth, in numbers whose protocol has a name."""
