"""Performer: attention by random features whose products estimate the softmax kernel (FAVOR+, Choromanski et al. 2021)."""

import torch
from torch import Tensor, nn

from genai_pl.kernels.efficient.common import refuse
from genai_pl.kernels.efficient.scan import attend_by_features, attend_without_mask
from genai_pl.kernels.mask import AttentionMask
from genai_pl.kernels.score_options import PLAIN, ScoreOptions


class Performer(nn.Module):
    """An estimate of softmax attention in time and memory linear in S; its error falls like 1 / sqrt(n_features).

    exp(q k) is the mean of phi(q) phi(k) over random features, so a sum over keys is a product of queries with one matrix
    sum(phi(k) v), which is carried along the row (`scan.py`) instead of T x S scores.

    head_dim: D. n_features: M; more are more exact. seed: of the first features, a constant of the checkpoint until
    `redraw`. Documents of a packed row must be numbered in their order, as packing numbers them.
    """

    features: Tensor

    def __init__(self, *, head_dim: int, n_features: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("features", orthogonal_features(n_features, head_dim, generator))

    def redraw(self, generator: torch.Generator) -> None:
        """Draw other features, in place; generator: one of the CPU. Training may redraw, so that no features are overfitted."""
        self.features.copy_(orthogonal_features(*self.features.shape, generator))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        options: ScoreOptions = PLAIN,
    ) -> Tensor:
        """(B, H, T, D); of `options` only the scale is computed."""
        refuse("performer", mask, options)
        half = (q.shape[-1] ** -0.5 if options.scale is None else options.scale) ** 0.5  # of the scale, for either side
        with torch.autocast(q.device.type, enabled=False):  # exponentials in bf16 would be off by whole percents
            exact = torch.promote_types(q.dtype, torch.float32)
            features = self.features.to(exact)
            log_q = log_features(q.to(exact).unflatten(1, (k.shape[1], -1)) * half, features)  # (B, K, G, T, M)
            log_k = log_features(k.to(exact) * half, features)[:, :, None]  # (B, K, 1, S, M)
            values = v.to(exact)[:, :, None]  # (B, K, 1, S, D)
            if mask.causal or mask.segments is not None:
                y = attend_by_features(log_q, log_k, values, mask)
            else:
                y = attend_without_mask(log_q, log_k, values)
        return y.flatten(1, 2).to(q.dtype)  # (B, H, T, D)


def log_features(x: Tensor, features: Tensor) -> Tensor:
    """Logarithms of positive features, x (..., D) and features (M, D) -> (..., M).

    The mean over m of exp(f(x)_m + f(y)_m) is exp(x y) in expectation (Lemma 1). Positive features, unlike sines, cannot
    cancel to a negative or tiny sum of weights.
    """
    return x @ features.t() - x.square().sum(-1, keepdim=True) / 2


def orthogonal_features(n_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
    """Rows of a standard normal distribution each, orthogonal within blocks of head_dim rows, (n_features, head_dim).

    Orthogonal rows estimate with less variance than independent ones (Theorem 2).
    """
    n_blocks = -(-n_features // head_dim)
    options = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    q, r = torch.linalg.qr(torch.randn(n_blocks, head_dim, head_dim, **options))
    # the factorization fixes signs; with those of r, columns point uniformly everywhere (Mezzadri 2007)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    rows = q.transpose(-2, -1).flatten(0, 1)[:n_features]  # (n_features, head_dim), of length 1
    lengths = torch.randn(n_features, head_dim, **options).norm(dim=-1, keepdim=True)
    return (rows * lengths).float()
