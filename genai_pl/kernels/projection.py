"""The projection onto the vocabulary, a chunk of tokens at a time: (tokens, V) logits never exist at once."""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 100 * 2**20

Rows = slice | Tensor  # the tokens of a chunk


class Projection:
    """softcap(hidden @ weight.T + bias) for hidden (N, C) and weight (V, C), and the gradients of those three.

    Products run in `matmul_dtype`, everything else in float32 (float64 if that is what comes in).
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, softcap: float | None, matmul_dtype: torch.dtype
    ) -> None:
        self.dtype = torch.promote_types(matmul_dtype, torch.float32)
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.matmul_weight = weight.to(matmul_dtype)
        self.softcap = softcap
        self.buffer = hidden.new_empty(0, dtype=self.dtype)
        self.slope: Tensor | None = None
        self.d_hidden: Tensor | None = None
        self.d_weight: Tensor | None = None
        self.d_bias: Tensor | None = None

    def track(self, needs: tuple[bool, ...]) -> None:
        """Start to collect the gradients of hidden, weight and bias, each where it is needed."""
        hidden, weight, bias = needs[:3]
        self.d_hidden = torch.zeros_like(self.hidden) if hidden else None
        # bf16 sums over many chunks would lose what the late chunks add
        self.d_weight = torch.zeros_like(self.weight, dtype=self.dtype) if weight else None
        self.d_bias = torch.zeros_like(self.bias, dtype=self.dtype) if bias else None

    @property
    def tracks(self) -> bool:
        return any(gradient is not None for gradient in (self.d_hidden, self.d_weight, self.d_bias))

    def logits(self, rows: Rows) -> Tensor:
        """The logits of some tokens, (n, V), in memory that the next call overwrites."""
        hidden = self.hidden[rows].to(self.matmul_weight.dtype)  # (n, C)
        n, V = hidden.shape[0], self.weight.shape[0]
        if self.buffer.shape[0] < n:
            self.buffer = self.buffer.new_empty(n, V)
        logits = self.buffer[:n]
        if hidden.dtype == self.dtype:
            torch.mm(hidden, self.matmul_weight.t(), out=logits)
        else:
            logits.copy_(hidden @ self.matmul_weight.t())
        if self.bias is not None:
            logits.add_(self.bias)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_()
            self.slope = logits.square().neg_().add_(1) if self.tracks else None
            logits.mul_(self.softcap)
        return logits

    def add_gradients(self, rows: Rows, d_logits: Tensor) -> None:
        """Add what the tokens of the latest `logits` give to the gradients; `d_logits` (n, V) is overwritten."""
        if self.slope is not None:
            d_logits.mul_(self.slope)
        if self.d_bias is not None:
            self.d_bias.add_(d_logits.sum(0))
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
        """The gradients of hidden, weight and bias in their own dtypes."""
        d_weight = None if self.d_weight is None else self.d_weight.to(self.weight.dtype)
        d_bias = None if self.d_bias is None else self.d_bias.to(self.bias.dtype)
        return self.d_hidden, d_weight, d_bias


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would multiply here: autocast's, where it is on."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def chunks(labels: Tensor, *, vocab_size: int, ignore_index: int, chunk_tokens: int | None) -> Iterator[Rows]:
    """The tokens that have a label, a chunk at a time; by default a chunk of float32 logits takes about 100 MiB.

    Finding them waits for the device once, which costs less than multiplying the others: 85 % in masked LM.
    """
    size = chunk_tokens or max(1, CHUNK_BYTES // (4 * vocab_size))
    N = labels.numel()
    kept = (labels != ignore_index).nonzero().squeeze(-1)
    if kept.numel() < N:
        yield from kept.split(size)
    else:
        yield from (slice(start, min(start + size, N)) for start in range(0, N, size))


def exp_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp (n, 1) of the logits (n, V), and the sum (n, 1) that makes a softmax of what they become."""
    peak = logits.amax(-1, keepdim=True)
    logits.sub_(peak).exp_()
    total = logits.sum(-1, keepdim=True)
    return peak + total.log(), total
