"""Scan: attention whose weights are products of positive features, by states that pass from block to block.

A query's weights factor over features, so the keys before its block are one state, a matrix of M features by D + 1 sums
that is updated block by block; keys of its own block are compared one by one. Time and memory are linear in the length.

Numbers: exponents stay logarithms beside sums whose largest term is near 1 (`Sums`), so that nothing overflows, and keys
that a query does not see, however large, do not move its sums.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.kernels.efficient.common import split_into_blocks
from genai_pl.kernels.mask import AttentionMask

BLOCK = 128  # positions that are compared one by one
EMPTY = float("-inf")  # the logarithm of a sum without terms


class Sums(NamedTuple):
    """exp(log) * total: sums over some keys of weight * (value, 1); the last entry is the sum of the weights."""

    log: Tensor  # (...)
    total: Tensor  # (..., D + 1)


def attend_without_mask(log_q: Tensor, log_k: Tensor, values: Tensor) -> Tensor:
    """Means of values (..., S, D) over all keys, (..., T, D), with weights sum_m exp(log_q[..., t, m] + log_k[..., s, m]).

    log_q (..., T, M), log_k (..., S, M): logarithms of the features of queries and keys.
    """
    return _divide([_query_state(log_q, _state(log_k, _with_ones(values)))])


def attend_by_features(log_q: Tensor, log_k: Tensor, values: Tensor, mask: AttentionMask) -> Tensor:
    """Means as in `attend_without_mask` over the keys that `causal` and `segments` of the mask show; zeros without any.

    log_q (B, K, G, T, M), log_k (B, K, 1, S, M) and values (B, K, 1, S, D): (B, K, G, T, D). Memory is linear in T and
    S: only blocks of queries meet blocks of keys, and the rest of the row is a state of M * (D + 1) numbers per block.
    """
    # queries and keys in blocks that end together; the last n of N blocks hold queries
    T, S = log_q.shape[-2], log_k.shape[-2]
    length = max(T, S)
    block = min(BLOCK, length)
    documents, query_documents = _documents(mask, T, S, log_q.device)  # (B, 1, 1, S, 1), (B, 1, 1, T, 1)
    queries, query_documents = (_blocks(x, T, block) for x in (log_q, query_documents))  # n blocks
    keys, values, documents = (_blocks(x, length, block) for x in (log_k, _with_ones(values), documents))
    documents, query_documents = documents[..., 0], query_documents[..., 0]  # (B, 1, 1, N or n, block)
    n = queries.shape[3]
    # keys of its own block, keys before it, and without a causal mask keys after it
    visible = _visible(query_documents, documents[:, :, :, -n:], causal=mask.causal)
    parts = [_within(queries, keys[:, :, :, -n:], values[:, :, :, -n:], visible)]
    parts.append(_from_states(queries, query_documents, _states_before(keys, values, documents)))
    if not mask.causal:  # keys after a block stand before it in the reversed row
        last = documents.amax() + 1
        reversed_documents = torch.where(documents == 0, 0, last - documents).flip(3)
        state, document = _states_before(keys.flip(3), values.flip(3), reversed_documents)
        after = Sums(state.log.flip(3), state.total.flip(3)), last - document.flip(3)
        parts.append(_from_states(queries, query_documents, after))
    return _divide(parts).flatten(3, 4)[:, :, :, -T:]


def _with_ones(values: Tensor) -> Tensor:
    """Values with a last entry of 1, (..., D) -> (..., D + 1), whose weighted sum is the sum of the weights."""
    return F.pad(values, (0, 1), value=1.0)


def _documents(mask: AttentionMask, T: int, S: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The document of each key (B or 1, 1, 1, S, 1) and of each query (B or 1, 1, 1, T, 1); all 1 without segments."""
    if mask.segments is None:
        keys, queries = (torch.ones(1, length, dtype=torch.long, device=device) for length in (S, T))
    else:
        keys, queries = mask.segments, mask.segments_of_queries(T, S)
    return keys[:, None, None, :, None], queries[:, None, None, :, None]


def _blocks(x: Tensor, length: int, block: int) -> Tensor:
    """Blocks of x, with zeros before it up to whole blocks that hold `length`, (..., L, D) -> (..., N, block, D)."""
    missing = length + -length % block - x.shape[-2]
    return split_into_blocks(F.pad(x, (0, 0, missing, 0)) if missing else x, block)


def _visible(query_documents: Tensor, documents: Tensor, *, causal: bool) -> Tensor:
    """True where a query sees a key of its own block, (B, 1, 1, n, block, block)."""
    queries, keys = query_documents[..., :, None], documents[..., None, :]
    visible = (queries == keys) & (keys != 0)
    return visible.tril() if causal else visible


def _within(log_q: Tensor, log_k: Tensor, values: Tensor, visible: Tensor) -> Sums:
    """The sums of each query over the visible keys of its own block, (B, K, G, n, block, D + 1).

    Each key has its own scale: with one per block, a large later key would push earlier ones to 0 for queries that do not
    see it.
    """
    top_q, top_k = (x.detach().amax(-1, keepdim=True) for x in (log_q, log_k))
    products = torch.exp(log_q - top_q) @ torch.exp(log_k - top_k).transpose(-2, -1)  # (B, K, G, n, block, block)
    sizes = top_k.transpose(-2, -1).masked_fill(~visible, EMPTY)  # (B, K, 1, n, block, block)
    top = sizes.amax(-1, keepdim=True)
    weights = products * torch.exp(sizes - _finite(top))
    return Sums((top_q + top).squeeze(-1), weights @ values)


def _state(log_k: Tensor, values: Tensor) -> Sums:
    """The state of some keys, log_k (..., S, M) and values (..., S, D + 1) -> (..., M, D + 1)."""
    top = log_k.detach().amax(-2)  # (..., M)
    return Sums(top, torch.exp(log_k - _finite(top)[..., None, :]).transpose(-2, -1) @ values)


def _query_state(log_q: Tensor, state: Sums) -> Sums:
    """The sums of each query, log_q (..., T, M), over the keys of a state, (..., T, D + 1)."""
    exponents = log_q + state.log[..., None, :]
    top = exponents.detach().amax(-1, keepdim=True)  # (..., T, 1)
    return Sums(top.squeeze(-1), torch.exp(exponents - _finite(top)) @ state.total)


def _states_before(log_k: Tensor, values: Tensor, documents: Tensor) -> tuple[Sums, Tensor]:
    """The state that reaches each block, (B, K, 1, N, M, D + 1), and the document that it belongs to, (B, 1, 1, N).

    Documents are numbered in their order, so only the last one that began may continue into a block; its state is kept,
    that of all others is dropped. Document 0 stands before the first block.
    """
    newest = documents.amax(-1).cummax(-1).values  # (B, 1, 1, N)
    elsewhere = documents != newest[..., None]
    blocks = _state(log_k.masked_fill(elsewhere[..., None], EMPTY), values)
    newest = F.pad(newest, (1, 0))  # (B, 1, 1, N + 1)
    # the loop: rescale to the larger of two exponents, then add
    goes_on = newest[..., 1:] == newest[..., :-1]
    state = Sums(torch.full_like(blocks.log[:, :, :, 0], EMPTY), torch.zeros_like(blocks.total[:, :, :, 0]))
    states = [state]
    for i in range(documents.shape[3] - 1):
        past = state.log.masked_fill(~goes_on[..., i, None], EMPTY)
        top = torch.maximum(past, blocks.log[:, :, :, i])
        old, new = (torch.exp(log - _finite(top))[..., None] for log in (past, blocks.log[:, :, :, i]))
        state = Sums(top, state.total * old + blocks.total[:, :, :, i] * new)
        states.append(state)
    logs, totals = zip(*states, strict=True)
    return Sums(torch.stack(logs, 3), torch.stack(totals, 3)), newest[..., :-1]


def _from_states(log_q: Tensor, query_documents: Tensor, states: tuple[Sums, Tensor]) -> Sums:
    """The sums of each query over the state that reaches its block, empty if it is of another document."""
    n = log_q.shape[3]
    state, document = states
    sums = _query_state(log_q, Sums(state.log[:, :, :, -n:], state.total[:, :, :, -n:]))
    other = (query_documents != document[..., -n:, None]) | (query_documents == 0)  # (B, 1, 1, n, block)
    return Sums(sums.log.masked_fill(other, EMPTY), sums.total)


def _divide(parts: list[Sums]) -> Tensor:
    """The mean of the values over all parts, (..., D): sums of values by the sum of weights, zeros where that is 0."""
    top = _finite(torch.stack([part.log for part in parts]).amax(0))
    total = sum(torch.exp(part.log - top)[..., None] * part.total for part in parts)
    weight = total[..., -1:]
    return total[..., :-1] / torch.where(weight > 0, weight, 1.0)


def _finite(log: Tensor) -> Tensor:
    """The logarithm, or 0 for a sum without terms: -inf minus -inf would be NaN."""
    return log.masked_fill(log == EMPTY, 0.0)
