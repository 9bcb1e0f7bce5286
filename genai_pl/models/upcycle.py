"""Upcycling: a dense model becomes a mixture of experts whose every expert begins as the dense MLP (Komatsuzaki et al. 2023)."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from genai_pl.config.model import EXPERT_FIELDS, ModelConfig
from genai_pl.errors import ConfigError
from genai_pl.models.build import Model
from genai_pl.models.experts import ExpertLinear, MoE
from genai_pl.models.transformer import Transformer


def upcycled_config(dense: ModelConfig, options: Mapping[str, object]) -> ModelConfig:
    """The configuration of a dense model with the experts of `options`: n_experts and the fields of `EXPERT_FIELDS`.

    ConfigError for options with which the first step could not have the dense model's loss.
    """
    experts = {field: options[field] for field in ("n_experts", *EXPERT_FIELDS)}
    if experts["expert_size"] not in (None, dense.intermediate_size):
        raise ConfigError(
            f"model.expert_size={experts['expert_size']}: an expert begins as the dense MLP of init_from, which has "
            f"{dense.intermediate_size} hidden channels; leave it null"
        )
    if experts["n_shared_experts"]:
        raise ConfigError("model.n_shared_experts would be added to the dense model of init_from: set it to 0")
    if not experts["normalize_top_k"] or experts["router_scale"] != 1:
        raise ConfigError(
            "model.normalize_top_k=false or model.router_scale would scale the MLPs of init_from: leave them as they are"
        )
    experts["expert_size"] = dense.intermediate_size
    return replace(dense, **experts)


@torch.no_grad()
def upcycle(model: Model, config: ModelConfig) -> Model:
    """The model with experts in the layers that `config` (of `upcycled_config`) names, in place; routers are drawn anew.

    The weights of a token's experts add up to 1 and all experts are equal, so the outputs are those of the dense model.
    """
    fields = {name: getattr(config, name) for name in ("n_experts", *EXPERT_FIELDS)}
    for stack in (module for module in model.modules() if isinstance(module, Transformer)):
        stack.config = replace(stack.config, **fields)
        for n in stack.config.mixture_layers:
            if n < len(stack.blocks):
                block = stack.blocks[n]
                block.mlp, block.is_mixture = _mixture(stack.config, block.mlp), True
    model.config = config
    return model


def _mixture(config: ModelConfig, dense: nn.Module) -> MoE:
    """Experts that are copies of a dense MLP, with its dtype and device, and a new router."""
    weight = next(dense.parameters())
    moe = MoE(config).to(weight).train(dense.training)
    for name, layer in moe.experts.named_children():
        if isinstance(layer, ExpertLinear):
            source = dense.get_submodule(name)
            if type(source) is not nn.Linear:
                raise ConfigError(
                    "model.n_experts: the model of init_from has an adapter: merge it first (format=merged)"
                )
            layer.weight.copy_(source.weight)  # broadcast over experts
            if layer.bias is not None:
                layer.bias.copy_(source.bias)
    nn.init.normal_(moe.router.weight, std=config.init_std)
    if moe.router.bias is not None:
        nn.init.zeros_(moe.router.bias)
    return moe
