"""Serving: requests become batches of a model, and answers over HTTP."""
