"""More room in the vocabulary of a model."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from genai_pl.models.build import Model
from genai_pl.models.encoder_decoder import EncoderDecoder
from genai_pl.models.hf.transformers_model import WrappedDecoder


def resize_vocabulary(model: Model | WrappedDecoder, size: int) -> None:
    """Give the model embeddings and logits for `size` tokens, in place: a new one begins as the mean of all old ones.

    With the mean, a new token is about as likely as the average one (Hewitt 2021); a random row could be likelier than
    all others.
    """
    if isinstance(model, WrappedDecoder):
        model.inner.resize_token_embeddings(size, mean_resizing=False)
        for layer in {model.embed, model.lm_head}:
            _fill(layer.weight.data, model.config.vocab_size)
        model.config.vocab_size, model.config.values = size, model.inner.config.to_dict()
        return
    layers = [model.embed] if model.lm_head is None else [model.embed, model.lm_head]
    for layer in layers:
        for name in [name for name, value in layer.named_parameters() if value is not None]:
            setattr(layer, name, _with_rows(getattr(layer, name), size))
    model.embed.num_embeddings = size
    if model.lm_head is not None:
        model.lm_head.out_features = size
    parts = [model, model.encoder, model.decoder] if isinstance(model, EncoderDecoder) else [model]
    for part in parts:
        part.config = replace(part.config, vocab_size=size)
    model.tie_weights()


@torch.no_grad()
def fill_vocabulary(model: Model | WrappedDecoder, first: int, size: int) -> None:
    """Let the tokens `first` to `size` - 1, for which the model had room but no use, begin as the mean of those before."""
    layers = [model.embed] if model.lm_head is None else [model.embed, model.lm_head]
    for table in {id(p): p for layer in layers for p in layer.parameters()}.values():
        _fill(table.data[:size], first)


def _with_rows(old: nn.Parameter, size: int) -> nn.Parameter:
    new = old.new_empty(size, *old.shape[1:])
    new[: len(old)] = old.detach()
    _fill(new, len(old))
    return nn.Parameter(new, requires_grad=old.requires_grad)


@torch.no_grad()
def _fill(table: Tensor, n_old: int) -> None:
    """Set the rows from n_old on to the mean of those before."""
    table[n_old:] = table[:n_old].float().mean(dim=0).to(table.dtype)
