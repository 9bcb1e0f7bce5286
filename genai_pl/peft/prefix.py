"""Prefix tuning (Li and Liang 2021): only keys and values in front of every layer's own are trained."""

import torch
from torch import Tensor, nn

from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models import EncoderDecoder
from genai_pl.models.transformer import Transformer
from genai_pl.peft.adapter import Adapter
from genai_pl.peft.adapter_layers import new_parameter
from genai_pl.peft.io.tensors import AdapterFile, fill
from genai_pl.peft.virtual_tokens import KEY, VirtualAdapter, config_of, install, stack_for, table_in, virtual_of


class Prefix(VirtualAdapter):
    """Keys and values (P, L * 2 * K * D) of all layers, or what an MLP with one hidden layer makes of P embeddings."""

    def __init__(self, adapter: Adapter, stack: Transformer, n_tokens: int, hidden_size: int | None, seed: int) -> None:
        super().__init__(adapter, n_tokens)
        config, like, generator = stack.config, stack.embed.weight, torch.Generator().manual_seed(seed)
        self.shape = (n_tokens, config.n_layer, 2, config.n_kv_head, config.head_dim)
        inner = config.n_kv_head * config.head_dim
        width = config.n_layer * 2 * inner
        self.weight = new_parameter(like, n_tokens, width if hidden_size is None else inner)
        self.mlp = None
        if hidden_size is not None:
            options = {"device": like.device, "dtype": self.weight.dtype}
            parts = nn.Linear(inner, hidden_size, **options), nn.Tanh(), nn.Linear(hidden_size, width, **options)
            self.mlp = nn.Sequential(*parts)
        for name, parameter in self.named_parameters():
            std = 0.0 if name.endswith("bias") else config.init_std
            if self.mlp is not None and parameter is self.weight:
                std = 1.0  # what the MLP is to tell apart
            parameter.data.copy_(torch.empty(parameter.shape).normal_(std=std, generator=generator))

    def table(self) -> Tensor:
        """All keys and values, (P, L * 2 * K * D)."""
        return self.weight if self.mlp is None else self.mlp(self.weight)

    def layers(self) -> Tensor:
        return self.table().view(self.shape).permute(1, 2, 3, 0, 4)  # (L, 2, K, P, D)


def prefix(model: nn.Module, *, n_tokens: int = 20, hidden_size: int | None = None, seed: int = 0) -> nn.Module:
    """The model, frozen, with n_tokens learned keys and values in each layer, which every query sees, beyond a window too.

    hidden_size    of an MLP that makes them while they are trained; a file holds its results

    In an encoder-decoder they are in the decoder's attention to itself, as PEFT has it. They change the model from the
    first step on, since they take a share of the attention.
    """
    stack = stack_for(model, "prefix", n_tokens, reads=False)
    if hidden_size is not None and hidden_size < 1:
        raise ConfigError(f"peft.hidden_size must be above 0, or null, not {hidden_size}")
    adapter = Adapter("prefix", {"n_tokens": n_tokens, "hidden_size": hidden_size, "seed": seed})
    return install(model, stack, Prefix(adapter, stack, n_tokens, hidden_size, seed))


@torch.no_grad()
def write_prefix(model: nn.Module, adapter: Adapter) -> AdapterFile:
    """The adapter in PEFT's layout, where an MLP has done its work."""
    tokens = virtual_of(model)
    P, L, _, K, D = tokens.shape
    two = isinstance(model, EncoderDecoder)
    config = config_of(model, "PREFIX_TUNING", tokens) | {
        "token_dim": K * D,
        "num_attention_heads": K,
        "num_transformer_submodules": 1 + two,
        "num_layers": L,
        "prefix_projection": False,
    }
    table = tokens.table()
    if two:  # PEFT reads four parts per layer, of which the last two fall away
        table = nn.functional.pad(table.view(P, L, 2 * K * D), (0, 2 * K * D)).flatten(1)
        config["num_layers"] = 2 * L
    return AdapterFile(config, {KEY: table}, {**adapter.options, "hidden_size": None})


def read_prefix(model: nn.Module, file: AdapterFile) -> nn.Module:
    """The model with the prefix, ours or one that PEFT has written."""
    table, n_tokens = table_in(file)
    model = prefix(model, n_tokens=n_tokens)
    if isinstance(model, EncoderDecoder):
        table = _of_decoder(table, model.config.n_decoder_layer, model.config.n_kv_head * model.config.head_dim)
    fill(virtual_of(model).weight, table, KEY)
    return model


def _of_decoder(table: Tensor, L: int, inner: int) -> Tensor:
    """What PEFT makes of a table for an encoder-decoder: all of it twice over, four parts per layer, the first two used."""
    if table.shape[1] % (2 * inner) or table.shape[1] < 2 * L * inner:
        raise CheckpointError(f"{KEY} has shape {list(table.shape)}, which is not keys and values of {L} layers")
    parts = table.repeat(1, 2).view(len(table), -1, inner)  # keys and values by turns
    return torch.cat([parts[:, 4 * n : 4 * n + 2].flatten(1) for n in range(L)], dim=1)
