"""Prompt tuning (Lester et al. 2021): learned embeddings before the first token of every document."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genai_pl.errors import ConfigError
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

INITS = ("random", "text", "vocabulary")


class Prompt(VirtualAdapter):
    """Learned embeddings `weight` (P, E), which enter where token embeddings do, before positions are added.

    first: their initial values.
    """

    def __init__(self, adapter: Adapter, first: Tensor) -> None:
        super().__init__(adapter, first.shape[0])
        self.weight = new_parameter(first, *first.shape)
        self.weight.data.copy_(first)

    def embeddings(self) -> Tensor:
        """The embeddings (P, E)."""
        return self.weight


def prompt(
    model: nn.Module,
    *,
    n_tokens: int = 20,
    init: str = "random",
    init_text: str | None = None,
    init_ids: Sequence[int] | None = None,
    seed: int = 0,
) -> nn.Module:
    """The model, frozen, with n_tokens learned embeddings before every document; in an encoder-decoder, before the source.

    They change the model from the first step on: no prompt is the same as none.
    init: "random" as the model initializes its embeddings, "vocabulary" for those of random tokens, "text" for those of the
        tokens `init_ids` of `init_text`, repeated if they are fewer than n_tokens.
    seed: of the random choices.
    """
    stack = stack_for(model, "prompt", n_tokens, reads=True)
    if init not in INITS:
        raise ConfigError(f"peft.init={init} is not one of {', '.join(INITS)}")
    if (init == "text") != bool(init_ids):
        fix = "set peft.init_text" if init == "text" else "set peft.init=text, or peft.init_text=null"
        raise ConfigError(f"peft.init={init} and peft.init_text={init_text} do not fit: {fix}")
    adapter = Adapter("prompt", {"n_tokens": n_tokens, "init": init, "init_text": init_text, "seed": seed})
    return install(model, stack, Prompt(adapter, _first(stack, n_tokens, init, init_ids, seed)))


def write_prompt(model: nn.Module, adapter: Adapter) -> AdapterFile:
    """The adapter in PEFT's layout."""
    tokens = virtual_of(model)
    config = config_of(model, "PROMPT_TUNING", tokens) | {
        "token_dim": tokens.weight.shape[1],
        "num_attention_heads": model.config.n_head,
        "num_transformer_submodules": 1,
    }
    return AdapterFile(config, {KEY: tokens.weight.detach(), **head_tensors(model, adapter)}, dict(adapter.options))


def read_prompt(model: nn.Module, file: AdapterFile) -> nn.Module:
    """The model with a prompt from a file that genai_pl or PEFT wrote."""
    table, n_tokens = table_in(file)
    model = prompt(model, n_tokens=n_tokens)
    # for an encoder-decoder PEFT stores twice as many rows and uses the first half
    fill(virtual_of(model).weight, table[:n_tokens], KEY)
    fill_head(model, file)
    return model


@torch.no_grad()
def _first(stack: Transformer, n_tokens: int, init: str, init_ids: Sequence[int] | None, seed: int) -> Tensor:
    """The initial embeddings, (P, E)."""
    generator, table = torch.Generator().manual_seed(seed), stack.embed.weight
    if init == "random":
        embeddings = torch.empty(n_tokens, table.shape[1]).normal_(std=stack.config.init_std, generator=generator)
        return embeddings.to(table)
    if init == "vocabulary":
        ids = torch.randint(table.shape[0], (n_tokens,), generator=generator)
    else:
        ids = torch.tensor(init_ids).repeat(-(-n_tokens // len(init_ids)))[:n_tokens]
    rows = table[ids.to(table.device)]
    return (
        rows if stack.embed_scale is None else rows * stack.embed_scale
    )  # the model does not scale the prompt, so it starts scaled
