"""Vocabulary growth: new rows in the embedding and the head of a model, for tokens that a tokenizer adds."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from genai_pl.models.build import Model
from genai_pl.models.encoder_decoder import EncoderDecoder
from genai_pl.models.hf.transformers_model import WrappedDecoder


def resize_vocabulary(model: Model | WrappedDecoder, size: int) -> None:
    """Give the model embeddings and logits for `size` tokens, in place: a new row is the mean of all old ones.

    With the mean, a new token is about as likely as the average one (Hewitt 2021); a random row could be likelier than
    all others. Parameters are new objects afterwards: build optimizers later.
    """
    if isinstance(model, WrappedDecoder):
        model.inner.resize_token_embeddings(size, mean_resizing=False)
        for layer in {model.embed, model.lm_head}:
            _fill(layer.weight.data, model.config.vocab_size)
        model.config.vocab_size, model.config.values = size, model.inner.config.to_dict()
        return
    # longer tables and biases
    layers = [model.embed] if model.lm_head is None else [model.embed, model.lm_head]
    for layer in layers:
        for name in [name for name, value in layer.named_parameters() if value is not None]:
            setattr(layer, name, _with_rows(getattr(layer, name), size))
    # the same size in every place that states it
    model.embed.num_embeddings = size
    if model.lm_head is not None:
        model.lm_head.out_features = size
    parts = [model, model.encoder, model.decoder] if isinstance(model, EncoderDecoder) else [model]
    for part in parts:
        part.config = replace(part.config, vocab_size=size)
    model.tie_weights()


@torch.no_grad()
def fill_vocabulary(model: Model | WrappedDecoder, first: int, size: int) -> None:
    """Set the rows `first` to `size` - 1 to the mean of those before, in place.

    For models whose tables are longer than their tokenizer (padded to a multiple of 64): rows that were never trained get
    tokens now.
    """
    layers = [model.embed] if model.lm_head is None else [model.embed, model.lm_head]
    for table in {id(p): p for layer in layers for p in layer.parameters()}.values():
        _fill(table.data[:size], first)


def _with_rows(old: nn.Parameter, size: int) -> nn.Parameter:
    """The parameter with `size` rows, the new ones filled."""
    new = old.new_empty(size, *old.shape[1:])
    new[: len(old)] = old.detach()
    _fill(new, len(old))
    return nn.Parameter(new, requires_grad=old.requires_grad)


@torch.no_grad()
def _fill(table: Tensor, n_old: int) -> None:
    """Set the rows from n_old on to the mean of those before, computed in float32."""
    table[n_old:] = table[:n_old].float().mean(dim=0).to(table.dtype)
