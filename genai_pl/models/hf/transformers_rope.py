"""Rotary positions that change with the length of a text: dynamic (NTK) and longrope, in models of transformers.

Beyond a length the frequencies of all positions are others: those of the text's length (dynamic), or a second set (longrope,
Ding et al. 2024). transformers takes them by the longest text of a batch, and with dynamic by earlier batches too. Here each
longer text is computed alone and without a cache, so that its numbers depend on nothing but itself.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.kernels import positions_from_segments
from genai_pl.models.hf.transformers_rows import document_rows
from genai_pl.models.virtual_tokens import VirtualTokens, virtual_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DYNAMIC, LONG = "dynamic", "longrope"  # values of rope_type


class LengthRope(NamedTuple):
    """The longest text whose frequencies are those of the training, in tokens, and the modules that keep others.

    kinds: the values of rope_type. modules: dynamic ones, each with the prefix of its buffers, empty or of a kind of layer.
    """

    limit: int
    kinds: frozenset[str]
    modules: tuple[tuple[nn.Module, str], ...]

    def is_exceeded(self, segments: Tensor | None, virtual: VirtualTokens | None) -> bool:
        """True if a text of these rows is longer than the limit, and others are beside it; virtual tokens count too."""
        if segments is None:  # all rows are as long
            return False
        n_virtual = virtual_prefix(virtual, is_first_call=False).n
        return int(positions_from_segments(segments).max()) + 1 + n_virtual > self.limit

    def each_alone(self, run: Callable[[Tensor], Tensor], input_ids: Tensor, segments: Tensor) -> Tensor:
        """Hidden states (B, T, C) of packed or padded texts (B, T), of which `run` computes one (1, N) -> (1, N, C)."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._check_ranks(torch.distributed.get_world_size())
        rows = document_rows(segments)
        texts = zip(rows.split(input_ids), rows.lengths.tolist(), strict=True)
        hidden = [run(text[None, : max(n, 1)])[0] for text, n in texts]
        return rows.join(nn.utils.rnn.pad_sequence(hidden, batch_first=True))

    def reset(self) -> None:
        """Forget the frequencies of earlier texts."""
        for module, prefix in self.modules:
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
            original = getattr(module, f"{prefix}original_inv_freq")
            module.register_buffer(
                f"{prefix}inv_freq", original.to(module.get_buffer(f"{prefix}inv_freq").device), False
            )

    def _check_ranks(self, n: int) -> None:
        """ConfigError for several ranks: a sharded model gathers its weights for as many passes on each."""
        if n > 1:
            raise ConfigError(
                f"a text of more than {self.limit} tokens, where positions of rope_type={', '.join(sorted(self.kinds))} change "
                f"with its length, is computed alone and on one device: set data.seq_len to at most {self.limit}"
            )


def length_rope(inner: "PreTrainedModel") -> LengthRope | None:
    """The rotary positions of a model that change with the length of a text, or None."""
    limits, modules, kinds = [], [], set()
    for module in inner.modules():
        types = getattr(module, "rope_type", None)
        for layer, kind in (types if isinstance(types, dict) else {None: types}).items():
            if not isinstance(kind, str) or (DYNAMIC not in kind and kind != LONG):
                continue
            prefix = "" if layer is None else f"{layer}_"
            kinds.add(kind)
            if kind == LONG:
                parameters = module.config.rope_parameters
                parameters = parameters if layer is None else parameters[layer]
                limits.append(parameters["original_max_position_embeddings"])
            else:
                limits.append(module.original_max_seq_len)
                modules.append((module, prefix))
    return LengthRope(min(limits), frozenset(kinds), tuple(modules)) if limits else None
