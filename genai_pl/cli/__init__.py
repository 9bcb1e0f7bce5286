"""Commands: what each does with its configuration, and everything of Hydra."""
