"""Checkpoints of training: one file or sharded, data only."""
