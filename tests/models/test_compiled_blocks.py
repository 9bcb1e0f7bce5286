"""Blocks under torch.compile, as compile=true has them: mixtures and attention sinks give the numbers of eager mode.

The default suite only traces them; what the compilers make of the trace takes minutes.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from genai_pl.models import Decoder, ModelConfig
from genai_pl.models.experts import collecting

SIZES = {
    "n_layer": 1, "n_head": 4, "n_embd": 32, "vocab_size": 61, "max_seq_len": 64, "init_std": 0.3, "position": "rotary",
    "norm": "rmsnorm", "gated_mlp": True,
}  # fmt: skip
GPT_OSS = {
    **SIZES, "attention_sinks": True, "window": 5, "n_experts": 4, "expert_size": 24, "router_bias": True,
    "activation": "clamped_swiglu",
}  # fmt: skip
DEEPSEEK = {**SIZES, "n_experts": 4, "expert_size": 24, "n_shared_experts": 1, "router": "sigmoid", "balance_bias": 0.1}


def step(options: dict, backend: str | None) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """Loss with its auxiliary part, gradients and loads of rows of two lengths, with packed documents and padding."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**options)).train()
    for block in model.blocks if backend else ():
        block.compile(backend=backend)
    loss, loads = torch.zeros(()), []
    for length in (12, 20):
        ids = torch.randint(1, 61, (2, length), generator=torch.Generator().manual_seed(length))
        segments = (torch.arange(length) > 4).long().expand(2, -1) + torch.tensor([[1], [0]])
        with collecting() as found:
            logits = model(ids, segments)
        loads += [layer.load for layer in found]
        loss = loss + cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss = loss + sum(layer.balance_loss + layer.router_z_loss for layer in found)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, loads


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [GPT_OSS, DEEPSEEK], ids=["gpt_oss", "deepseek"])
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_blocks_give_the_losses_gradients_and_loads_of_eager_ones(options: dict, backend: str) -> None:
    torch.compiler.reset()
    expected, actual = step(options, None), step(options, backend)
    assert len(expected[2]) == 2
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
