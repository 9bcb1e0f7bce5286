"""ONNX quantization: matrices of a graph in 8 bits, and what that costs in accuracy."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto

SEEN = 64  # tokens of the comparison
BLOCK = 32  # weights of a row that share a scale


class Cost(NamedTuple):
    """The bytes of a graph before and after, and how far its first output moved on random input.

    mean: of the absolute difference. scale: the standard deviation of the output before.
    """

    before: int
    after: int
    mean: float
    scale: float

    def __str__(self) -> str:
        share = self.mean / self.scale if self.scale else 0.0
        return f"{self.after / 1e6:,.1f} MB for {self.before / 1e6:,.1f}, off by {share:.1%} of the output's spread"


def quantize_graph(file: Path, *, vocab_size: int, max_seq_len: int) -> Cost:
    """Replace a graph's matrices by 8-bit ones, in its file; inputs of products are rounded when they come, by blocks too.

    vocab_size, max_seq_len: bounds of the random tokens of the comparison. One scale for a whole input, as quantize_dynamic
    has, breaks a language model: a few of its channels are far larger than all others.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(
        logging.WARNING
    )  # a line for each node
    # outputs before, quantization, outputs after
    n = min(SEEN, max_seq_len)
    exact, before = first_output(file, vocab_size, n), _size(file)
    model = onnx.load(file)
    fold_transposes(model)
    quantizer = MatMulNBitsQuantizer(model, bits=8, block_size=BLOCK, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    for part in _parts(file):
        part.unlink()
    quantizer.model.save_model_to_file(str(file), use_external_data_format=before > 2**31)
    quantized = first_output(file, vocab_size, n)
    return Cost(before, _size(file), float(np.abs(quantized - exact).mean()), float(exact.std()))


def fold_transposes(model: "ModelProto") -> None:
    """Store weights in the orientation that the graph needs, and drop its Transpose nodes: only a constant can be quantized."""
    from onnx import numpy_helper

    graph = model.graph
    weights = {weight.name: weight for weight in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]:
        order = next(list(attribute.ints) for attribute in node.attribute if attribute.name == "perm")
        transposed = numpy_helper.to_array(weights[node.input[0]]).transpose(order)
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(transposed), node.output[0]))
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for weight in [weight for weight in graph.initializer if weight.name not in used]:
        graph.initializer.remove(weight)


def first_output(file: Path, vocab_size: int, n: int) -> np.ndarray:
    """The first output of a graph for n random tokens (one row, no past)."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.log_severity_level = 3
    session = InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    # inputs of the graph's own shapes and types: random tokens and source states, masks of ones
    rng = np.random.default_rng(0)
    inputs = {}
    for node in session.get_inputs():
        size = [{"batch": 1, "past": 0}.get(d, n) if isinstance(d, str) else d for d in node.shape]
        if node.type != "tensor(int64)":
            kind = np.float16 if node.type == "tensor(float16)" else np.float32
            inputs[node.name] = rng.standard_normal(size).astype(kind)
        elif node.name == "input_ids":
            inputs[node.name] = rng.integers(0, vocab_size, size)
        else:
            inputs[node.name] = np.full(size, int(node.name.endswith("mask")), dtype=np.int64)
    return session.run(None, inputs)[0].astype(np.float32)


def _parts(file: Path) -> list[Path]:
    """The files of a graph: itself, and weights beside it."""
    return [file, *file.parent.glob(f"{file.name}.*")]


def _size(file: Path) -> int:
    return sum(part.stat().st_size for part in _parts(file))
