"""Chunked logits: the projection onto the vocabulary for some tokens at a time, so that (tokens, V) logits never exist at once.

The logits of 4096 tokens and 128k words are 2 GiB in float32, and autograd would keep several copies. A loss here takes a
chunk of tokens, makes their logits, reduces them to what it needs, turns them into their own gradient in place, multiplies
back, and takes the next chunk into the same buffer. `cross_entropy.py` and `logprobs.py` are the two losses.
"""

import functools
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from genai_pl.kernels.attention import HAS_TRITON

log = logging.getLogger(__name__)

# Bytes of float32 logits in a chunk. With 128k words a GPU gets 1000 tokens, enough for products at full speed; a CPU is as
# fast with 200.
CHUNK_BYTES = 100 * 2**20
GPU_CHUNK_BYTES = 512 * 2**20
BLOCK_BYTES = 8 * 2**20  # of float32 logits that a CPU passes over several times: they should stay in its caches
FUSED_DEVICES = {"cuda"}  # tests add cpu, for Triton's interpreter

Rows = slice | Tensor  # indices of a chunk's tokens among the N


class Projection:
    """softcap(hidden @ weight.T + bias) for hidden (N, C), weight (V, C) and bias (V,), and the gradients of those three.

    Products run in `matmul_dtype`, everything else in float32 (float64 for float64 inputs). may_fuse: whether the Triton
    kernel may be used; `fused` says that it is, and `cross_entropy_` then does all between the products.

    The order of calls: `track` once if gradients are needed; for each chunk `logits`, a loss that turns them into their
    gradient in place (by `cross_entropy_`, or on each of `float_blocks`), `add_gradients`; at last `gradients`.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        softcap: float | None,
        matmul_dtype: torch.dtype,
        may_fuse: bool = True,
    ) -> None:
        self.dtype = torch.promote_types(matmul_dtype, torch.float32)
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.matmul_weight = weight.to(matmul_dtype)
        self.softcap = softcap
        self.fused = may_fuse and fuses(hidden.device, matmul_dtype)
        self.buffer = hidden.new_empty(0, weight.shape[0], dtype=matmul_dtype)
        self.scratch = hidden.new_empty(0, weight.shape[0], dtype=self.dtype)
        self.d_hidden: Tensor | None = None
        self.d_weight: Tensor | None = None
        self.d_bias: Tensor | None = None

    def track(self, needs: tuple[bool, ...]) -> None:
        """Allocate gradients of hidden, weight and bias, each where `needs` is true (`ctx.needs_input_grad`)."""
        hidden, weight, bias = needs[:3]
        self.d_hidden = torch.zeros_like(self.hidden) if hidden else None
        # in float32: a bf16 sum over many chunks would lose what the late chunks add
        self.d_weight = torch.zeros_like(self.weight, dtype=self.dtype) if weight else None
        self.d_bias = torch.zeros_like(self.bias, dtype=self.dtype) if bias else None

    @property
    def tracks(self) -> bool:
        """True if any gradient is collected."""
        return any(gradient is not None for gradient in (self.d_hidden, self.d_weight, self.d_bias))

    def logits(self, rows: Rows) -> Tensor:
        """The bare products of a chunk, (n, V), in `matmul_dtype` and a buffer that the next call overwrites."""
        hidden = self.hidden[rows].to(self.matmul_weight.dtype)  # (n, C)
        logits = self._logits_buffer(hidden.shape[0])
        return torch.mm(hidden, self.matmul_weight.t(), out=logits)

    def _logits_buffer(self, n: int) -> Tensor:
        """An uninitialized (n, V), a view of the buffer."""
        V = self.weight.shape[0]
        if self.buffer.shape[0] < n:
            # an odd V would misalign every row but the first: loads of 2 bytes instead of 16
            width = -(-V // 64) * 64 if self.fused else V
            self.buffer = self.buffer.new_empty(n, width)
        return self.buffer[:n, :V]

    def float_blocks(self, logits: Tensor, *, whole: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of a chunk's products (n, V) after the other, as (rows, logits with bias and cap) in float32.

        What the caller leaves in a block is the gradient of its logits, and becomes that of the products in the chunk. A
        block is a view where products are float32 already; bf16 ones are converted a block at a time, so that a chunk is
        read and written once from memory, in 2 bytes a number. whole: all rows as one block.
        """
        n, V = logits.shape
        size = n if whole or logits.device.type != "cpu" else max(1, BLOCK_BYTES // (self.dtype.itemsize * V))
        for start in range(0, n, size):
            products = logits[start : start + size]
            block = products
            if products.dtype != self.dtype:
                if self.scratch.shape[0] < products.shape[0]:
                    self.scratch = self.scratch.new_empty(products.shape)
                block = self.scratch[: products.shape[0]].copy_(products)
            slope = self._cap_(block)
            yield slice(start, start + products.shape[0]), block
            if not self.tracks:
                continue
            if slope is not None:
                block.mul_(slope)
            if self.d_bias is not None:
                self.d_bias.add_(block.sum(0))
            if block is not products:
                products.copy_(block)

    def _cap_(self, logits: Tensor) -> Tensor | None:
        """Add the bias and cap the products, in place; returns the slope of the cap where a gradient needs it."""
        if self.bias is not None:
            logits.add_(self.bias)
        if self.softcap is None:
            return None
        logits.div_(self.softcap).tanh_()
        slope = logits.square().neg_().add_(1) if self.tracks else None
        logits.mul_(self.softcap)
        return slope

    def cross_entropy_(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        weights: Tensor | None = None,
        with_gradients: bool = True,
    ) -> Tensor:
        """The loss (n,) of each token from fused `logits` (n, V), which become their gradient times `weights` (n,)."""
        from genai_pl.kernels import softmax_triton

        options = softmax_triton.Softmax(
            self.bias, self.softcap, label_smoothing, z_loss, weights=weights, with_gradients=with_gradients
        )
        return softmax_triton.cross_entropy_(logits, labels, options)

    def add_gradients(self, rows: Rows, d_logits: Tensor) -> None:
        """Add a chunk's share of the gradients; d_logits (n, V): the gradient of the latest `logits`.

        rows: the chunk. Gradients of hidden rows are set, those of weight and bias summed over chunks.
        """
        if self.fused and self.d_bias is not None:
            self.d_bias.add_(d_logits.sum(0, dtype=self.dtype))
        if self.d_hidden is not None:
            self.d_hidden[rows] = (d_logits @ self.matmul_weight).to(self.d_hidden.dtype)
        if self.d_weight is not None:
            hidden = self.hidden[rows].to(d_logits.dtype)
            if hidden.dtype == self.dtype:
                self.d_weight.addmm_(d_logits.t(), hidden)
            else:
                self.d_weight.add_(d_logits.t() @ hidden)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of hidden, weight and bias in their own dtypes; None for those that are not tracked."""
        d_weight = None if self.d_weight is None else self.d_weight.to(self.weight.dtype)
        d_bias = None if self.d_bias is None else self.d_bias.to(self.bias.dtype)
        return self.d_hidden, d_weight, d_bias


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would multiply: autocast's, where it is on."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def fuses(device: torch.device, matmul_dtype: torch.dtype) -> bool:
    """True if everything between the products runs as one Triton kernel.

    Eager code passes over the logits seven times and more, the kernel three times.
    """
    if device.type not in FUSED_DEVICES or matmul_dtype == torch.float64:
        return False
    if not HAS_TRITON:
        _log_once("cross entropy: in eager mode, because triton is not installed (pip install triton)")
    return HAS_TRITON


@functools.cache
def _log_once(message: str) -> None:
    log.info(message)


def tokens_at_once(vocab_size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> int:
    """Tokens in a chunk by default: as many as logits fit into the device's budget, at least one.

    A CPU holds the logits of a chunk in `dtype`, that of the products; elsewhere float32 ones may stand beside them.
    """
    if device.type == "cpu":
        return max(1, CHUNK_BYTES // (min(4, dtype.itemsize) * vocab_size))
    return max(1, GPU_CHUNK_BYTES // (4 * vocab_size))


def chunks(
    labels: Tensor, *, vocab_size: int, ignore_index: int, chunk_tokens: int | None, dtype: torch.dtype = torch.float32
) -> Iterator[Rows]:
    """Chunks of the tokens that have a label, `chunk_tokens` or `tokens_at_once` of them at a time.

    labels: (N,). vocab_size: V, or this process's share. dtype: of the products. ignore_index: the label of tokens that are
    skipped; to find the others waits for the device once, which costs less than to multiply them (85 % of tokens in
    masked LM).
    """
    size = chunk_tokens or tokens_at_once(vocab_size, labels.device, dtype)
    N = labels.numel()
    labelled = (labels != ignore_index).nonzero().squeeze(-1)
    if labelled.numel() < N:
        yield from labelled.split(size)
    else:
        yield from (slice(start, min(start + size, N)) for start in range(0, N, size))


def softmax_(logits: Tensor) -> Tensor:
    """Log-sum-exp (n, 1) of logits (n, V), which become their softmax.

    torch's softmax passes over a row while it is in the cache. Its largest probability gives the log-sum-exp back: it is at
    least 1 / V, whatever the logits are.
    """
    peak = logits.amax(-1, keepdim=True)
    torch.softmax(logits, -1, out=logits)
    return peak - logits.amax(-1, keepdim=True).log()
