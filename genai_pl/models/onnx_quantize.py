"""ONNX graphs with weights in 8 bits, and what that costs."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

SEEN = 64  # tokens that the comparison reads


class Cost(NamedTuple):
    """The bytes of a graph before and after, and how far its first output moved on random input."""

    before: int
    after: int
    mean: float  # of the absolute difference
    scale: float  # the standard deviation of the output

    def __str__(self) -> str:
        share = self.mean / self.scale if self.scale else 0.0
        return f"{self.after / 1e6:,.1f} MB for {self.before / 1e6:,.1f}, off by {share:.1%} of the output's spread"


def quantize_graph(file: Path, *, vocab_size: int, max_seq_len: int) -> Cost:
    """Put 8-bit weights in the place of a graph's matrices and embeddings; products quantize their inputs as they come."""
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    small, folded = (file.with_name(f"{kind}-{file.name}") for kind in ("int8", "folded"))
    # a transposed weight is no constant before it is folded, and would stay as it is
    quant_pre_process(file, folded, skip_symbolic_shape=True)
    # x86 without VNNI adds two products in 16 bits: unsigned weights of 7 bits do not overflow
    quantize_dynamic(folded, small, weight_type=QuantType.QUInt8, per_channel=True, reduce_range=True)
    n = min(SEEN, max_seq_len)
    before, after = (first_output(graph, vocab_size, n) for graph in (file, small))
    sizes = (_size(file), _size(small))
    for part in [*_parts(file), *_parts(folded)]:
        part.unlink()
    small.rename(file)
    return Cost(*sizes, float(np.abs(after - before).mean()), float(before.std()))


def first_output(file: Path, vocab_size: int, n: int) -> np.ndarray:
    """What a graph says of n random tokens after no others."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.log_severity_level = 3
    session = InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    draw = np.random.default_rng(0)
    given = {}
    for node in session.get_inputs():
        size = [{"batch": 1, "past": 0}.get(d, n) if isinstance(d, str) else d for d in node.shape]
        if node.type != "tensor(int64)":
            kind = np.float16 if node.type == "tensor(float16)" else np.float32
            given[node.name] = draw.standard_normal(size).astype(kind)
        elif node.name == "input_ids":
            given[node.name] = draw.integers(0, vocab_size, size)
        else:
            given[node.name] = np.full(size, int(node.name.endswith("mask")), dtype=np.int64)
    return session.run(None, given)[0].astype(np.float32)


def _parts(file: Path) -> list[Path]:
    """The graph and the weights that are beside it."""
    return [file, *file.parent.glob(f"{file.name}.*")]


def _size(file: Path) -> int:
    return sum(part.stat().st_size for part in _parts(file))
