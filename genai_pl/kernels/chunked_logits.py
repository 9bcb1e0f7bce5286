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
FUSED_DEVICES = {"cuda"}  # tests add cpu, for Triton's interpreter

Rows = slice | Tensor  # indices of a chunk's tokens among the N


class Projection:
    """softcap(hidden @ weight.T + bias) for hidden (N, C), weight (V, C) and bias (V,), and the gradients of those three.

    Products run in `matmul_dtype`, everything else in float32 (float64 for float64 inputs). may_fuse: whether the Triton
    kernel may be used; `fused` says that it is. Then `logits` are bare products, and `cross_entropy_` does the rest.

    The order of calls: `track` once if gradients are needed; for each chunk `logits`, a loss that turns them into their
    gradient in place, `add_gradients`; at last `gradients`.
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
        self.buffer = hidden.new_empty(0, weight.shape[0], dtype=matmul_dtype if self.fused else self.dtype)
        self.slope: Tensor | None = None
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
        """The logits of a chunk, (n, V), in a buffer that the next call overwrites."""
        hidden = self.hidden[rows].to(self.matmul_weight.dtype)  # (n, C)
        logits = self._logits_buffer(hidden.shape[0])
        if hidden.dtype == logits.dtype:
            torch.mm(hidden, self.matmul_weight.t(), out=logits)
        else:
            logits.copy_(hidden @ self.matmul_weight.t())
        return logits if self.fused else self._cap_(logits)

    def _logits_buffer(self, n: int) -> Tensor:
        """An uninitialized (n, V), a view of the buffer."""
        V = self.weight.shape[0]
        if self.buffer.shape[0] < n:
            # an odd V would misalign every row but the first: loads of 2 bytes instead of 16
            width = -(-V // 64) * 64 if self.fused else V
            self.buffer = self.buffer.new_empty(n, width)
        return self.buffer[:n, :V]

    def _cap_(self, logits: Tensor) -> Tensor:
        """Add the bias and cap the products, in place; keeps the cap's slope for the gradient."""
        if self.bias is not None:
            logits.add_(self.bias)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_()
            self.slope = logits.square().neg_().add_(1) if self.tracks else None
            logits.mul_(self.softcap)
        return logits

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
        """Add a chunk's share of the gradients; d_logits (n, V): the gradient of the latest `logits`, which is overwritten.

        rows: the chunk. Gradients of hidden rows are set, those of weight and bias summed over chunks.
        """
        if self.slope is not None:
            d_logits.mul_(self.slope)
        if self.d_bias is not None:
            self.d_bias.add_(d_logits.sum(0, dtype=self.dtype))
        d_logits = d_logits.to(self.matmul_weight.dtype)
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


def tokens_at_once(vocab_size: int, device: torch.device) -> int:
    """Tokens in a chunk by default: as many as float32 logits fit into the device's budget, at least one."""
    budget = CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES
    return max(1, budget // (4 * vocab_size))


def chunks(labels: Tensor, *, vocab_size: int, ignore_index: int, chunk_tokens: int | None) -> Iterator[Rows]:
    """Chunks of the tokens that have a label, `chunk_tokens` or `tokens_at_once` of them at a time.

    labels: (N,). vocab_size: V, or this process's share. ignore_index: the label of tokens that are skipped; to find the
    others waits for the device once, which costs less than to multiply them (85 % of tokens in masked LM).
    """
    size = chunk_tokens or tokens_at_once(vocab_size, labels.device)
    N = labels.numel()
    labelled = (labels != ignore_index).nonzero().squeeze(-1)
    if labelled.numel() < N:
        yield from labelled.split(size)
    else:
        yield from (slice(start, min(start + size, N)) for start in range(0, N, size))


def exp_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp (n, 1) of logits (n, V), which become exponentials, and the sum (n, 1) that makes them a softmax."""
    peak = logits.amax(-1, keepdim=True)
    logits.sub_(peak).exp_()
    total = logits.sum(-1, keepdim=True)
    return peak + total.log(), total
