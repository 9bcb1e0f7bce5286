"""Training runs from the configuration to the exported folder."""
