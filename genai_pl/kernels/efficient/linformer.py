"""Linformer: attention to a fixed number of mixtures of all positions, linear in S (Wang et al. 2020)."""

import torch
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.kernels.attention import attention_with
from genai_pl.kernels.efficient.common import refuse
from genai_pl.kernels.mask import EVERYTHING, AttentionMask
from genai_pl.kernels.score_options import PLAIN, ScoreOptions


class Linformer(nn.Module):
    """softmax(q (E k)^T * scale) F v with learned E and F (rank, max_seq_len), one pair per key head (eq. 7).

    max_seq_len: the longest row; a shorter one uses the first columns of E and F. rank: the number of mixtures. n_kv_head:
    K. Every mixture holds every position, so there is no causal form, and a row is one document.
    """

    def __init__(self, *, max_seq_len: int, rank: int, n_kv_head: int) -> None:
        super().__init__()
        self.max_seq_len, self.rank = max_seq_len, rank
        self.key_projection = nn.Parameter(torch.empty(n_kv_head, rank, max_seq_len))
        self.value_projection = nn.Parameter(torch.empty(n_kv_head, rank, max_seq_len))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw E and F from normal(0, 1/rank), which preserves lengths on average (Theorem 2), by the global generator."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=self.rank**-0.5)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        options: ScoreOptions = PLAIN,
    ) -> Tensor:
        """(B, H, T, D); scale, softcap and dropout of `options` apply to scores of mixtures."""
        refuse("linformer", mask, options, supported=("softcap", "dropout"))
        T, S = q.shape[2], k.shape[2]
        self._check(mask, S)
        # padding must be 0 in the mixtures: no softmax hides it later
        if mask.segments is not None:
            hidden = (mask.segments == 0)[:, None, :, None]  # (B, 1, S, 1)
            k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        keys = (self.key_projection[..., :S] @ k).to(q.dtype)  # (B, K, R, D)
        values = (self.value_projection[..., :S] @ v).to(q.dtype)  # (B, K, R, D)
        mixed = mask.remember("linformer", (T, S, self.rank), lambda: self._mixture_mask(mask, T, S))
        return attention_with(q, keys, values, mixed, options)

    def _check(self, mask: AttentionMask, S: int) -> None:
        """ConfigError for a causal mask and for rows longer than E and F."""
        if mask.causal:
            raise ConfigError("model.attention_kind=linformer mixes all positions and needs model.shape=encoder")
        if self.max_seq_len < S:
            raise ConfigError(
                f"{S} tokens are more than the {self.max_seq_len} that model.attention_kind=linformer projects: "
                "set model.max_seq_len"
            )

    def _mixture_mask(self, mask: AttentionMask, T: int, S: int) -> AttentionMask:
        """The mask of queries over mixtures: all of them, for queries that are no padding; ConfigError for packed rows."""
        if mask.segments is None:
            return EVERYTHING
        document = mask.segments.amax(-1, keepdim=True)  # (B, 1)
        if ((mask.segments != 0) & (mask.segments != document)).any():
            raise ConfigError(
                "model.attention_kind=linformer cannot keep the documents of a packed row apart: "
                "set data.separate_documents=false"
            )
        return AttentionMask(segments=document.expand(-1, self.rank), query_segments=mask.segments_of_queries(T, S))
