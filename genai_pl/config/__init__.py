"""Configuration as plain data: what a model and a decoding are, bounds of options, secrets. No torch, no Hydra.

These dataclasses are read from YAML, stored in checkpoints and exchanged with Hugging Face's config.json. They
import nothing above errors, so that `--help` and a typo are answered without loading torch.
"""
