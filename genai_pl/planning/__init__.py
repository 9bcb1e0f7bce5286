"""Cost of a training step on other machines: memory, traffic and time."""
