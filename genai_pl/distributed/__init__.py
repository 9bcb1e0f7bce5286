"""Sharded tensors and the collectives of a tensor-parallel group."""
