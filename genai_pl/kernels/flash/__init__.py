"""Flash attention in Triton: forward, backward, and the operator around them (Dao 2023).

From the outside in: `operator.py` (what autograd and torch.compile see), `launch.py` (which kernels run), `problem.py` (their
arguments), `config.py` (block sizes), `forward.py` and `backward.py` (the kernels), `blocks.py` (which blocks a program
visits), `mask_tables.py` (what it reads of a mask), `common.py` (what happens within a block).

Names in kernels: M queries and N keys of a block, i and j their indices, F the compile-time features, pointers in capitals.
"""
