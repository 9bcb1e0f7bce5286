"""What the flash attention kernels share: which blocks to visit, who sees whom in them, scores and dropout.

A query sees keys in one interval almost always, so a block of keys is outside (skipped), full (no mask work) or an edge,
where every pair is compared as `AttentionMask` words it. Scores live in the log2 domain, where exp2 is one instruction.
"""

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from genai_pl.kernels.flash_tables import FULL_END, FULL_START, N_ROWS, PREFIX, RANK, SEEN_END, SEEN_START, SEGMENT

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_ROW = tl.constexpr(
    {"seen_start": SEEN_START, "seen_end": SEEN_END, "full_start": FULL_START, "full_end": FULL_END}
)
