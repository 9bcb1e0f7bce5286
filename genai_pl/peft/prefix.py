"""Prefix tuning (Li and Liang 2021): learned keys and values before those of the tokens, in every layer."""

import torch
from torch import Tensor, nn

from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models import EncoderDecoder
from genai_pl.models.transformer import Transformer
from genai_pl.peft.adapter import Adapter
from genai_pl.peft.adapter_layers import new_parameter
from genai_pl.peft.io.tensors import AdapterFile, fill
from genai_pl.peft.virtual_tokens import (
    KEY,
    VirtualAdapter,
    config_of,
    fill_head,
    head_tensors,
    install,
    stack_for,
    table_in,
    virtual_of,
)


class Prefix(VirtualAdapter):
    """Learned keys and values of P virtual tokens in L layers.

    weight: (P, L * 2 * K * D), or with an MLP its inputs (P, K * D). mlp: None, or an MLP with `hidden_size` units and tanh that
    makes the keys and values, which trains more stably (section 4.3). seed: of the initialization, normal with init_std.
    """

    def __init__(self, adapter: Adapter, stack: Transformer, n_tokens: int, hidden_size: int | None, seed: int) -> None:
        super().__init__(adapter, n_tokens)
        config, like, generator = stack.config, stack.embed.weight, torch.Generator().manual_seed(seed)
        # one row per virtual token: all keys and values, or the input of the MLP that makes them
        self.shape = (n_tokens, config.n_layer, 2, config.n_kv_head, config.head_dim)
        inner = config.n_kv_head * config.head_dim
        width = config.n_layer * 2 * inner
        self.weight = new_parameter(like, n_tokens, width if hidden_size is None else inner)
        self.mlp = None
        if hidden_size is not None:
            options = {"device": like.device, "dtype": self.weight.dtype}
            parts = nn.Linear(inner, hidden_size, **options), nn.Tanh(), nn.Linear(hidden_size, width, **options)
            self.mlp = nn.Sequential(*parts)
        # drawn on the CPU from the seed, so that devices and processes agree
        for name, parameter in self.named_parameters():
            std = 0.0 if name.endswith("bias") else config.init_std
            if self.mlp is not None and parameter is self.weight:
                std = 1.0  # inputs of the MLP, which must differ between tokens
            parameter.data.copy_(torch.empty(parameter.shape).normal_(std=std, generator=generator))

    def table(self) -> Tensor:
        """All keys and values, (P, L * 2 * K * D), as the file holds them."""
        return self.weight if self.mlp is None else self.mlp(self.weight)

    def layers(self) -> Tensor:
        """Keys and values by layer, (L, 2, K, P, D), as attention takes them."""
        return self.table().view(self.shape).permute(1, 2, 3, 0, 4)  # (L, 2, K, P, D)


def prefix(model: nn.Module, *, n_tokens: int = 20, hidden_size: int | None = None, seed: int = 0) -> nn.Module:
    """The model, frozen, with n_tokens learned keys and values in each layer, which every query attends to.

    A sliding window does not exclude them. In an encoder-decoder they are in the decoder's self-attention, as in PEFT. They
    change the model from the first step on, since they take a share of the attention.
    hidden_size: of an MLP that makes them during training, or None; a file holds its results. seed: of the initialization.
    """
    stack = stack_for(model, "prefix", n_tokens, reads=False)
    if hidden_size is not None and hidden_size < 1:
        raise ConfigError(f"peft.hidden_size must be above 0, or null, not {hidden_size}")
    adapter = Adapter("prefix", {"n_tokens": n_tokens, "hidden_size": hidden_size, "seed": seed})
    return install(model, stack, Prefix(adapter, stack, n_tokens, hidden_size, seed))


@torch.no_grad()
def write_prefix(model: nn.Module, adapter: Adapter) -> AdapterFile:
    """The adapter in PEFT's layout: keys and values as the MLP makes them, so that the file needs no MLP."""
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
    if two:  # PEFT splits the table into four parts per layer and uses the first two
        table = nn.functional.pad(table.view(P, L, 2 * K * D), (0, 2 * K * D)).flatten(1)
        config["num_layers"] = 2 * L
    return AdapterFile(config, {KEY: table, **head_tensors(model, adapter)}, {**adapter.options, "hidden_size": None})


def read_prefix(model: nn.Module, file: AdapterFile) -> nn.Module:
    """The model with a prefix from a file that genai_pl or PEFT wrote."""
    table, n_tokens = table_in(file)
    model = prefix(model, n_tokens=n_tokens)
    if isinstance(model, EncoderDecoder):
        table = _of_decoder(table, model.config.n_decoder_layer, model.config.n_kv_head * model.config.head_dim)
    fill(virtual_of(model).weight, table, KEY)
    fill_head(model, file)
    return model


def _of_decoder(table: Tensor, L: int, inner: int) -> Tensor:
    """The keys and values that PEFT uses from its table for an encoder-decoder, (P, L * 2 * K * D).

    PEFT repeats the table and splits it into four parts per layer, of which the first two count. inner: K * D.
    """
    if table.shape[1] % (2 * inner) or table.shape[1] < 2 * L * inner:
        raise CheckpointError(f"{KEY} has shape {list(table.shape)}, which is not keys and values of {L} layers")
    parts = table.repeat(1, 2).view(len(table), -1, inner)  # keys and values by turns
    return torch.cat([parts[:, 4 * n : 4 * n + 2].flatten(1) for n in range(L)], dim=1)
