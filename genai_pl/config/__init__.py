"""Plain data of the configuration: what a model and a decoding are, and what their options may be."""
