"""Flash attention in Triton: forward, backward, and the operator around them."""
