"""Files that other people's runtimes run, each behind the interface of our own: tokens in, logits out."""
