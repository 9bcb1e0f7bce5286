"""Pooling: one vector, or one score, per text from the hidden states of its tokens."""

import torch
from torch import Tensor, nn

from genai_pl.config.enums import Shape
from genai_pl.errors import ConfigError
from genai_pl.objectives.preference import segment_ends

POOLINGS = ("mean", "last", "cls")  # values of the option objective.pooling
KINDS = (*POOLINGS, "max", "mean_sqrt_len", "weighted")  # and of a sentence-transformers folder


def pool(hidden: Tensor, segment_ids: Tensor, kind: str) -> Tensor:
    """Embeddings (B, C) of texts padded on the right, from their hidden states (B, T, C); segment_ids (B, T): 0 is padding.

    kind: mean (encoders), last (decoders, whose last token has seen all others), cls (the first token, BERT), max;
    mean_sqrt_len: the sum over the root of the length; weighted: the mean where position t counts t times, for decoders
    (Muennighoff 2022, eq. 1). ConfigError for another name.

    >>> pool(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]), "mean")
    tensor([[2.]])
    """
    if kind not in KINDS:
        raise ConfigError(f"objective.pooling={kind} is not one of {', '.join(POOLINGS)}")
    if kind == "cls":
        return hidden[:, 0]
    real = segment_ids > 0  # (B, T)
    if kind == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), real.sum(1) - 1]
    if kind == "max":
        return hidden.masked_fill(~real[..., None], float("-inf")).amax(1)
    weights = real[..., None].to(hidden.dtype)
    if kind == "weighted":
        weights = weights * torch.arange(1, hidden.shape[1] + 1, device=hidden.device, dtype=hidden.dtype)[:, None]
    total = weights.sum(1)
    return (hidden * weights).sum(1) / (total.sqrt() if kind == "mean_sqrt_len" else total)


def scores(model: nn.Module, input_ids: Tensor, segment_ids: Tensor, n: int, **extra_inputs: Tensor) -> Tensor:
    """The first label's score of segments 1 .. n of each row, (B, n) in float32: see `label_scores`."""
    return label_scores(model, input_ids, segment_ids, n, **extra_inputs)[..., 0]


def label_scores(model: nn.Module, input_ids: Tensor, segment_ids: Tensor, n: int, **extra_inputs: Tensor) -> Tensor:
    """The scores (B, n, n_labels) of segments 1 .. n of each row, in float32, from the model's head for scores.

    A decoder's score is that of a segment's last token, an encoder's that of its first, or of the mean of its states where
    its configuration has score_mean. extra_inputs: keyword arguments of `features`, such as `shared_prompt_len`.
    """
    hidden = model.features(input_ids, segment_ids, **extra_inputs)  # (B, T, C)
    if model.config.score_mean:
        numbers = torch.arange(1, n + 1, device=hidden.device)
        own = (segment_ids[:, None] == numbers[:, None]).to(hidden.dtype)  # (B, n, T)
        return model.label_logits(own @ hidden / own.sum(-1, keepdim=True).clamp(min=1)).float()
    if model.config.shape is Shape.encoder:
        numbers = torch.arange(1, n + 1, device=hidden.device)
        token_positions = (segment_ids[:, None] == numbers[:, None]).int().argmax(-1)  # the first token of each
    else:
        token_positions = segment_ends(segment_ids, n)  # (B, n)
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]
    return model.label_logits(hidden[rows, token_positions]).float()
