"""Initial weights: the distribution of every parameter.

| parameter                                | distribution                                                |
|------------------------------------------|-------------------------------------------------------------|
| embed, position, types, relative, lm_head| normal(0, init_std)                                         |
| embed where scale_head                   | normal(0, 1) (T5: logits are its products / sqrt(n_embd))   |
| XLNet's position and type parameters     | normal(0, init_std)                                         |
| q_proj k_proj v_proj gate_proj up_proj   | normal(0, init_std)                                         |
| router, sinks of attention               | normal(0, init_std)                                         |
| o_proj down_proj (write to the residual) | normal(0, init_std / sqrt(2 n_layer)) (Radford et al. 2019) |
| biases                                   | 0                                                           |
| norm weights; norm biases                | 1; 0                                                        |

The 2 n_layer projections that write to the residual stream are scaled down so that its variance does not grow with depth:
each adds a term, and the sum of n independent terms has n times their variance. `init_std` is 0.02 by default, GPT-2's.
"""

import math

from torch import nn

from genai_pl.config.model import ModelConfig
from genai_pl.models.attention import Attention
from genai_pl.models.experts import ExpertLinear, Router
from genai_pl.models.relative_positions import XLPositions


def init_weights(model: nn.Module, config: ModelConfig) -> None:
    """Draw every parameter from the table above, from torch's global generator, in the order of `named_modules`.

    The order is part of a seed's meaning: a module that is assigned earlier in a constructor changes all later draws.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | ExpertLinear | Router):
            residual = name.endswith(("o_proj", "down_proj"))
            std = config.init_std / math.sqrt(2 * config.n_layer) if residual else config.init_std
            if name == "embed" and config.scale_head:
                std = 1.0
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, XLPositions):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=config.init_std)
        if isinstance(module, Attention) and module.sinks is not None:
            nn.init.normal_(module.sinks, std=config.init_std)
        if isinstance(module, nn.Linear | ExpertLinear | Router) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.reset_parameters()
