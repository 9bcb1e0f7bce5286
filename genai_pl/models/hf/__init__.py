"""Hugging Face folders: configuration and weights in both directions, and models that transformers runs."""
