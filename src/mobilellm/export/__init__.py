"""From a model directory to the files that devices run."""
