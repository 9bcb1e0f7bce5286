"""Model protocols: the members that strategies, adapters, decoding and serving rely on, whatever class a model is of.

`Decoder`, `Encoder`, `EncoderDecoder` and the wrapper of a transformers model are different classes. Code outside
`genai_pl.models` uses the members that are named here, and no other attribute by its name in a string: whoever renames
one finds its users by this file, and `tests/models/test_protocol.py` checks every class against it. The names of
submodules (`embed`, `blocks`, `lm_head`) are also keys of state dicts: renaming one of them breaks checkpoints.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from genai_pl.config.model import ModelConfig
from genai_pl.distributed.context_group import ContextGroup
from genai_pl.models.kv_cache import KVCache


class LanguageModel(Protocol):
    """A model of any shape: tokens to hidden states, hidden states to logits.

    config: its configuration
    embed: the token embedding
    lm_head: the layer from hidden states to logits; None on a model that embeds or scores text
    blocks: its layers in order, each of which FSDP, recomputation and float8 treat as a unit; a shared one repeats
    feature_methods: names of the methods that run the layers instead of `forward`; FSDP gathers weights before them
    context_group: ranks that divide the tokens of each row (`ALONE`: none); hidden states are those of this rank's tokens
    """

    config: ModelConfig
    embed: nn.Embedding
    lm_head: nn.Linear | None
    blocks: Sequence[nn.Module]
    feature_methods: tuple[str, ...]
    context_group: ContextGroup

    def features(self, input_ids: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, C) of input_ids (B, T); segment_ids (B, T): 0 is padding, 1.. the documents of a row."""

    def to_head(self, hidden: Tensor) -> Tensor:
        """The input of `lm_head`, of hidden states (..., C)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C)."""

    def tie_weights(self) -> None:
        """Let the head share the embedding's weight, where the configuration says so."""


class CausalModel(LanguageModel, Protocol):
    """A model that continues text: a decoder of any origin."""

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty KV cache for rows of at most max_length tokens, to be passed to `features` as `cache`."""


class PipelineModel(LanguageModel, Protocol):
    """A model whose blocks can be divided among the stages of a pipeline.

    input_modules: the modules that make the input of the first block
    output_modules: the modules after the last block: norm and head
    """

    input_modules: Iterable[nn.Module]
    output_modules: Iterable[nn.Module]

    def with_blocks(self, blocks: range, received: Callable[[], Tensor] | None) -> "PipelineModel":
        """A model of the same modules with these blocks only, on hidden states that `received` returns (None: embeddings)."""


@runtime_checkable
class TensorParallelLayer(Protocol):
    """A part of a block whose linear layers can be divided among ranks (Shoeybi et al. 2019, section 3).

    column_layers: linear layers whose output channels are divided: heads of queries, keys and values, hidden channels
    row_layers: linear layers that take those channels, and whose outputs are partial sums
    """

    column_layers: Iterable[nn.Module]
    row_layers: Iterable[nn.Module]
