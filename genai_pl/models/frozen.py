"""Frozen weights in 16 bits: half their memory in a run with bf16 products, which compute the same numbers from them.

Under autocast a float32 weight is rounded to bfloat16 for every product, and the rounded copy is kept for the backward pass.
A weight that is not trained may as well be rounded once. Two cases differ in what is lost:

1. A weight that only enters products, as those of blocks do, loses nothing for the run. Its file keeps the exact weight: a run
   writes the adapter alone. Who needs the exact weight afterwards, to merge for example, loads it again.
2. Any other, such as an embedding, is held in 16 bits only if that is exact. It often is: most models are published in bfloat16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.models.encoder_decoder import EncoderDecoder
from genai_pl.models.experts import ExpertLinear
from genai_pl.models.transformer import Transformer


class FrozenLinear(nn.Linear):
    """x W^T + b, (..., in) -> (..., out), of a W in bfloat16; without autocast in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class RoundedLinear(FrozenLinear):
    """The same with a W that has lost bits, which a merge would need."""


class FrozenExperts(ExpertLinear):
    """Products of experts with weights in bfloat16, which they take as they are."""


class FrozenEmbedding(nn.Embedding):
    """Embeddings (..., C) in float32, as the residual stream is, from a table in bfloat16."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids).float()


EXACT = {nn.Linear: FrozenLinear, ExpertLinear: FrozenExperts, nn.Embedding: FrozenEmbedding}
PLAIN = {frozen: kind for kind, frozen in EXACT.items()}


@torch.no_grad()
def hold_frozen_in_16_bits(model: nn.Module, *, rounds: bool) -> int:
    """Keep frozen float32 weights of linear layers and embeddings in bfloat16, in place; returns the bytes saved.

    rounds: whether weights of the blocks' linear layers may lose bits, as nothing but products reads them; without it, and
    for all others, only where it is exact. Ties and shared weights stay. Models of transformers keep theirs: their own
    code asks for dtypes.
    """
    if not isinstance(model, Transformer | EncoderDecoder):
        return 0
    in_blocks = {module for block in model.blocks for module in block.modules()}
    saved = 0
    for weight, readers in _readers(model).items():
        is_other = weight.requires_grad or weight.dtype is not torch.float32
        if is_other or any(type(reader) not in EXACT for reader in readers):
            continue
        rounded = weight.bfloat16()
        is_exact = torch.equal(rounded.float(), weight)
        if not is_exact and not (rounds and all(type(r) is nn.Linear and r in in_blocks for r in readers)):
            continue
        weight.data = rounded
        saved += rounded.nbytes
        for reader in readers:
            reader.__class__ = EXACT[type(reader)] if is_exact else RoundedLinear
    return saved


@torch.no_grad()
def hold_frozen_in_32_bits(model: nn.Module) -> None:
    """Undo `hold_frozen_in_16_bits`, in place, for sums that must not be rounded; ConfigError where bits were lost."""
    if any(isinstance(module, RoundedLinear) for module in model.modules()):
        raise ConfigError("this model's frozen weights are rounded to 16 bits, for training: load it again to merge it")
    for module in model.modules():
        if type(module) in PLAIN:
            module.weight.data = module.weight.data.float()
            module.__class__ = PLAIN[type(module)]


def is_held_in_16_bits(model: nn.Module) -> bool:
    """Whether `hold_frozen_in_16_bits` has changed a layer of the model."""
    return any(isinstance(module, (*PLAIN, RoundedLinear)) for module in model.modules())


def _readers(model: nn.Module) -> dict[nn.Parameter, list[nn.Module | None]]:
    """The modules that have each parameter as their `weight`; None for one that calls it otherwise."""
    readers: dict[nn.Parameter, list[nn.Module | None]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            readers.setdefault(parameter, []).append(module if name == "weight" else None)
    return readers
