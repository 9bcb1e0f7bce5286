"""Products of this CPU: whether bfloat16 pays, measured once a process.

Processors differ by a factor of 100 here: AMX multiplies bfloat16 four to ten times faster than float32, AVX512-BF16 about
twice as fast, and without either torch emulates it, many times slower than float32. Names of processors do not tell, the
more so in a virtual machine; a product of each kind does, in about ten milliseconds.
"""

import functools
import time

import torch

SIZE = 384  # of the square matrices: 0.1 GFLOP a product, and all three fit into a cache
RUNS = 6
PAYS = (
    1.4  # times faster than float32: far from the ratios that processors have, so that a busy machine decides the same
)


@functools.cache
def bf16_products_pay() -> bool:
    """True if this CPU multiplies matrices in bfloat16 clearly faster than in float32."""
    return bf16_speed_up() >= PAYS


@functools.cache
def bf16_speed_up() -> float:
    """How many times faster a product of bfloat16 matrices is than one of float32 here: the best of several of each, in turns."""
    a, b = torch.randn(2, SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    sides = {torch.float32: (a, b), torch.bfloat16: (a.bfloat16(), b.bfloat16())}
    best = dict.fromkeys(sides, float("inf"))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for left, right in sides.values():
            left @ right  # the first call of a kind prepares kernels
        for _ in range(RUNS):
            for dtype, (left, right) in sides.items():
                start = time.perf_counter()
                left @ right
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]
