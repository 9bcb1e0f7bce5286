"""Distributed tensors: shards of DTensors, and the collectives of a tensor-parallel group with their gradients."""
