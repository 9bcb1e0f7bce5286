"""The decoder-only Transformer: GPT-2, Llama and what lies between, by configuration."""

from functools import partial

import torch
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.kernels import AttentionMask, positions_from_segments
from genai_pl.models.block import Block
from genai_pl.models.cache import KVCache
from genai_pl.models.init import init_weights
from genai_pl.models.layers import build_norm
from genai_pl.models.positions import rotary, sinusoidal
from genai_pl.specs import ModelConfig, NormOrder, Position


class Decoder(nn.Module):
    """Next-token logits (B, T, V) of input_ids (B, T), with packing by `segment_ids` and a cache as an argument."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError("model.vocab_size is not known: set it, or build the model with a tokenizer")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.position, self.rotary = _build_positions(config)
        self.max_length = config.max_seq_len if config.position is Position.learned else None
        self.window, self.logit_softcap = config.window, config.logit_softcap
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        # a post-norm block ends in a norm of its own
        self.norm = build_norm(config, config.n_embd) if config.norm_order is NormOrder.pre else nn.Identity()
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        init_weights(self, config)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head share the embedding's weight where the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, segment_ids: Tensor | None = None, *, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) in the dtype of the weights; segment_ids (B, T): 0 is padding, 1.. the row's documents."""
        return self.logits(self.features(input_ids, segment_ids, cache=cache))

    def features(self, input_ids: Tensor, segment_ids: Tensor | None = None, *, cache: KVCache | None = None) -> Tensor:
        """Hidden states (B, T, C) before the head; with a cache, the T tokens follow what it holds, and it advances."""
        T = input_ids.shape[1]
        past = 0 if cache is None else cache.length
        self._check_length(past + T)
        if cache is not None:
            segment_ids = cache.segments(segment_ids, T)
        if segment_ids is None:
            positions = torch.arange(past, past + T, device=input_ids.device)  # (T,)
        else:
            positions = positions_from_segments(segment_ids)[:, -T:]  # (B, T)
        x = self.dropout(self._embed(input_ids, positions))
        table = None if self.rotary is None else self.rotary(positions)
        mask = AttentionMask(causal=True, window=self.window, segments=segment_ids)
        for block in self.blocks:
            x = block(x, mask, rotary=table, cache=cache)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C)."""
        logits = self.lm_head(hidden)
        if self.logit_softcap is None:
            return logits
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for this model's device and dtype, autocast's where that is on."""
        weight = self.embed.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return KVCache(self.config, batch_size, max_length, device=weight.device, dtype=dtype)

    def _embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(input_ids)  # (B, T, C)
        return x if self.position is None else x + self.position(positions).to(x.dtype)

    def _check_length(self, length: int) -> None:
        # past the table, a CPU raises IndexError and a GPU dies in a device-side assertion
        if self.max_length is not None and length > self.max_length:
            raise ConfigError(
                f"{length} tokens are more than model.max_seq_len ({self.max_length}), where learned positions end: "
                "shorten the text, or train with a greater model.max_seq_len or with model.position=rotary"
            )


def _build_positions(config: ModelConfig) -> tuple[nn.Embedding | partial | None, partial | None]:
    """What is added to the embeddings, and what turns queries and keys."""
    if config.position is Position.learned:
        return nn.Embedding(config.max_seq_len, config.n_embd), None
    if config.position is Position.sinusoidal:
        return partial(sinusoidal, n_embd=config.n_embd), None
    if config.position is Position.rotary:
        return None, partial(rotary, head_dim=config.head_dim, theta=config.rope_theta)
    return None, None  # ALiBi lives in the scores
