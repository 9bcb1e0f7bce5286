"""Cost of a run on other machines: memory, traffic and time of a training step, without running it."""
