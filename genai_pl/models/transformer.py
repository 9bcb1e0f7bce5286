"""Transformer: embeddings, a stack of blocks and a head, the part that decoder and encoder share.

A pass goes `embed_inputs` -> `forward_blocks` -> `to_head` -> `lm_head`. Subclasses decide what stands between: which
tokens see which (`causal`), which position each has, and what a cache or virtual tokens add. Everything that the
configuration decides is decided here once, when the model is built: `forward` never asks it.
"""

import math
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from genai_pl.config.enums import Head, NormOrder, Position, Shape
from genai_pl.config.labels import KEYS as LABEL_KEYS
from genai_pl.config.labels import Labels
from genai_pl.config.model import ModelConfig
from genai_pl.distributed.context_group import ALONE, ContextGroup
from genai_pl.errors import ConfigError
from genai_pl.kernels import AttentionMask
from genai_pl.models.attention import AttentionInputs
from genai_pl.models.block import Block
from genai_pl.models.init import init_weights
from genai_pl.models.kv_cache import KVCache
from genai_pl.models.layers import HeadTransform, OffsetEmbedding, Pooler, build_norm
from genai_pl.models.positions import rotary, sinusoidal
from genai_pl.models.relative_positions import RelativeBias
from genai_pl.models.virtual_tokens import NO_PREFIX, VirtualPrefix, VirtualTokens, distance_bias, virtual_prefix


class Transformer(nn.Module):
    """input_ids (B, T) to hidden states (B, T, C), and those to logits (B, T, V).

    config: the sizes and kinds of everything; `vocab_size` must be known. cross: whether blocks also attend to an encoder.
    A subclass sets `causal`: whether a token sees only itself and those before it.

    Attributes that other folders rely on: `embed` and `lm_head` (one weight if tied), `blocks`, `norm`, `virtual` (prompt
    and prefix tuning set it), `max_length` (None where positions have no end), `windows` (one entry per layer). Names of
    modules are keys of checkpoints, and must not change.
    """

    causal: bool
    feature_methods: tuple[str, ...] = ("features",)  # see `LanguageModel`, as the next
    context_group: ContextGroup = ALONE

    def __init__(self, config: ModelConfig, *, cross: bool = False) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError("model.vocab_size is not known: set it, or build the model with a tokenizer")
        self.config = config
        # tokens and positions to the input of the first block; ALBERT's embeddings are narrower than its blocks
        E = config.embedding_size
        self.embed = nn.Embedding(config.vocab_size, E)
        self.position = _build_added_positions(config)
        self.types = nn.Embedding(config.n_token_types, E) if config.n_token_types else None
        self.embed_norm = build_norm(config, E) if config.embed_norm else nn.Identity()
        self.embed_proj = nn.Linear(E, config.n_embd) if config.n_embd != E else nn.Identity()
        self.embed_scale = math.sqrt(config.n_embd) if config.scale_embeddings else None
        self.rotary, self.rotary_local = _build_rotary(config)
        self.relative = RelativeBias(config, causal=self.causal) if config.position is Position.relative else None
        self.max_length = config.max_seq_len if config.position is Position.learned else None
        self.n_alibi = config.n_head if config.position is Position.alibi else 0
        self.virtual: VirtualTokens | None = None
        # the stack
        self.dropout = nn.Dropout(config.dropout)
        if config.share_layers:
            self.blocks = nn.ModuleList([Block(config, 0, cross=cross)] * config.n_layer)
        else:
            self.blocks = nn.ModuleList(Block(config, layer, cross=cross) for layer in range(config.n_layer))
        self.windows = [_window(config, layer) for layer in range(config.n_layer)]
        # hidden states to logits; a post-norm block ends in a norm of its own
        self.norm = nn.Identity() if config.norm_order is NormOrder.post else build_norm(config, config.n_embd)
        self.transforms_scores = config.score_transform and config.head.scores
        has_transform = config.head is Head.transform or self.transforms_scores
        self.transform = HeadTransform(config) if has_transform else nn.Identity()
        self.pooler = Pooler(config.n_embd) if config.pooler else None
        self.head_scale = config.n_embd**-0.5 if config.scale_head else None
        self.logit_softcap = config.logit_softcap
        self.lm_head = None
        self.score_dense = nn.Linear(config.n_embd, config.n_embd) if config.score_dense else None
        self.score = None
        if config.head.scores:
            self.score = nn.Linear(config.n_embd, config.n_labels, bias=config.head_bias)
        if config.head.predicts_tokens:
            width = E if config.head is Head.transform else config.n_embd
            self.lm_head = nn.Linear(width, config.vocab_size, bias=config.head_bias)
        init_weights(self, config)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head share the embedding's weight where `tie_embeddings` is set (Press and Wolf 2017)."""
        if self.config.tie_embeddings and self.lm_head is not None:
            self.lm_head.weight = self.embed.weight

    def set_head(self, head: Head, labels: Labels | None = None) -> None:
        """Replace the head by none, or by a new linear layer `score` that turns a hidden state into one number for each label.

        labels: names of the outputs; None is one output without a name (a reward). A head that has these outputs stays.
        An encoder's head for texts has a dense layer before it: that of the old head, else the folder's pooler, else a new one.
        The labels of the old head go with it.
        """
        names = {} if labels is None else labels.values()
        extra = {key: value for key, value in self.config.extra.items() if key not in LABEL_KEYS} | names
        n = 1 if labels is None else len(labels.names)
        self.lm_head = None
        self._keep_transform(self.config.score_transform and head.scores)
        if head.scores and self.config.head is head and self.config.n_labels == n:
            self.config = replace(self.config, extra=extra)
            return
        dense = head is Head.score and self.config.shape is Shape.encoder and not self.transforms_scores
        bias = dense or head is Head.tokens or self.transforms_scores  # as transformers' classes have it
        options = {"head": head, "head_bias": bias, "n_labels": n, "score_dense": dense}
        pooler = self.config.pooler and not head.scores  # it becomes the dense layer, or has no place in the new class
        self.config = replace(self.config, **options, pooler=pooler, extra=extra)
        self.score, self.score_dense = None, self.score_dense if dense else None
        if head.scores:
            self._build_score_head()

    def _keep_transform(self, wanted: bool) -> None:
        """Let the new head have the layers of head=transform before it: those of the old head, else new ones; or none."""
        self.transforms_scores = wanted
        if not wanted:
            self.transform = nn.Identity()
        elif isinstance(self.transform, nn.Identity):
            self.transform = HeadTransform(self.config).to(self.embed.weight)
            nn.init.normal_(self.transform.dense.weight, std=self.config.init_std)

    def _build_score_head(self) -> None:
        """New layers `score`, and `score_dense` where there is one, on the device and in the dtype of the embedding."""
        like, config = self.embed.weight, self.config
        options = {"device": like.device, "dtype": like.dtype}
        self.score = nn.Linear(config.n_embd, config.n_labels, bias=config.head_bias, **options)
        for parameter in self.score.parameters():
            nn.init.zeros_(parameter)  # random scores are as large as the states, and must be unlearned first
        if config.score_dense and self.score_dense is None:
            self.score_dense = nn.Linear(config.n_embd, config.n_embd, **options)
            nn.init.normal_(self.score_dense.weight, std=config.init_std)
            nn.init.zeros_(self.score_dense.bias)
            if self.pooler is not None:
                self.score_dense.load_state_dict(self.pooler.state_dict())
        self.pooler = None

    def label_logits(self, hidden: Tensor) -> Tensor:
        """The outputs (..., n_labels) of the head for scores, of hidden states (..., C)."""
        if self.transforms_scores:
            hidden = self.dropout(self.transform(hidden))
        if self.score_dense is not None:
            hidden = self.dropout(torch.tanh(self.score_dense(hidden)))
        return self.score(hidden)

    @property
    def input_modules(self) -> list[nn.Module]:
        """The modules that make the input of the first block; positions without weights are functions, not modules."""
        parts = (self.embed, self.position, self.types, self.embed_norm, self.embed_proj)
        return [part for part in parts if isinstance(part, nn.Module)]

    @property
    def output_modules(self) -> list[nn.Module]:
        """The modules after the last block."""
        return [part for part in (self.norm, self.transform, self.lm_head) if part is not None]

    def with_blocks(self, blocks: range, received: Callable[[], Tensor] | None) -> "Transformer":
        """A model of the same modules that computes these blocks only: a stage of a pipeline.

        `received` returns the hidden states (B, T, C) that enter the first of them; None: the embeddings do. In place of the
        other blocks, and of the last norm if the last block is not among these, the input is passed on.
        """
        part = copy(self)
        part._modules = dict(self._modules)  # the copy shares modules, and may leave some out
        part.blocks = nn.ModuleList(block if n in blocks else PassOn() for n, block in enumerate(self.blocks))
        if len(self.blocks) - 1 not in blocks:
            part.norm = PassOn()
        if received is not None:
            part.embed_inputs = lambda *_, **__: received()
        return part

    def to_head(self, hidden: Tensor) -> Tensor:
        """The input of `lm_head`, (..., C or embedding_size), from hidden states (..., C).

        Losses take this and the weight of the head, and make logits in chunks (`kernels.linear_cross_entropy`).
        """
        if self.lm_head is None:
            raise ConfigError("this model has no language-model head: it embeds or scores text")
        hidden = self.transform(hidden)
        return hidden if self.head_scale is None else hidden * self.head_scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C), capped where the configuration caps them (Gemma 2)."""
        hidden = self.to_head(hidden)
        logits = self.lm_head(hidden)
        if self.logit_softcap is None:
            return logits
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def embed_inputs(
        self,
        input_ids: Tensor,
        positions: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        insert_virtual: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The input of the first block, (B, T, C): token, position and type embeddings added, normed, projected to C.

        positions: (T,) or (B, T), each token's place in its document. token_type_ids: (B, T), None is type 0.
        insert_virtual: a function that adds virtual tokens to the token embeddings (B, T, E); positions and types then
        count them too. Pipeline stages after the first replace this method by the states that they receive.
        """
        x = self.embed(input_ids)  # (B, T, E)
        if self.embed_scale is not None:
            x = x * torch.tensor(self.embed_scale, dtype=x.dtype)  # rounded to it, as Gemma's code does
        if insert_virtual is not None:
            x = insert_virtual(x)
        if self.position is not None:
            x = x + self.position(positions).to(x.dtype)
        if self.types is not None:
            zeros = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
            x = x + self.types(zeros if token_type_ids is None else token_type_ids)
        return self.embed_proj(self.dropout(self.embed_norm(x)))

    def forward_blocks(
        self,
        x: Tensor,
        positions: Tensor,
        segments: Tensor | None,
        *,
        prefix: Tensor | None = None,
        shared_prompt_len: Tensor | None = None,
        virtual: VirtualPrefix = NO_PREFIX,
        segment_differs: Tensor | None = None,
        encoded: Tensor | None = None,
        encoded_mask: AttentionMask | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) after all blocks and the last norm, of the last T of S tokens.

        x (B, T, C): the blocks' input. positions (S,) or (B, S) and segments (B, S): of all keys, the cached ones first.
        prefix (B,): how many first keys see each other. shared_prompt_len (B,): how many first keys begin every document.
        virtual: virtual tokens before the row. The others are those of `AttentionInputs` and `Block.forward`.
        """
        T = x.shape[1]
        # one mask, rotary table and bias for all layers with the same window, so that each is built once a pass
        global_prefix = virtual.global_prefix if shared_prompt_len is None else shared_prompt_len
        rules = {"causal": self.causal, "segments": segments, "prefix": prefix}
        # without documents and window no rule hides the first keys from later tokens
        masks = {
            w: AttentionMask(window=w, global_prefix=None if w is None and segments is None else global_prefix, **rules)
            for w in set(self.windows)
        }
        tables = {w: self._rotary_table(w, positions[..., -T:]) for w in set(self.windows)}
        bias = self._bias(T, positions, by_position=global_prefix is not None and segments is not None)
        # the stack
        for n, (block, window) in enumerate(zip(self.blocks, self.windows, strict=True)):
            virtual_kv = None if virtual.layers is None else virtual.layers[n]
            inputs = AttentionInputs(
                rotary=tables[window], bias=bias, segment_differs=segment_differs, virtual_kv=virtual_kv, cache=cache
            )
            x = block(x, masks[window], inputs, encoded=encoded, encoded_mask=encoded_mask)
        return self.norm(x)

    def virtual_prefix(self, *, is_first_call: bool) -> VirtualPrefix:
        """The virtual tokens before each row; is_first_call: whether they must be computed.

        Later calls find their keys and values in the cache.
        """
        return virtual_prefix(self.virtual, is_first_call=is_first_call)

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for max_length tokens a row, beside the virtual tokens, on the model's device.

        Its dtype is autocast's where that is on: keys and values come in it.
        """
        n_virtual = self.virtual_prefix(is_first_call=False).n
        if n_virtual:
            longest = max_length + n_virtual
            max_length = longest if self.max_length is None else min(longest, max(max_length, self.max_length))
        weight = self.embed.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return KVCache(self.config, batch_size, max_length, device=weight.device, dtype=dtype)

    def check_length(self, length: int) -> None:
        """ConfigError for more tokens than there are learned positions."""
        # past the table, a CPU raises IndexError and a GPU dies in a device-side assertion
        if self.max_length is not None and length > self.max_length:
            raise ConfigError(
                f"{length} tokens are more than model.max_seq_len ({self.max_length}), where learned positions end: "
                "shorten the text, or train with a greater model.max_seq_len or with model.position=rotary"
            )

    def _bias(self, T: int, positions: Tensor, *, by_position: bool) -> Tensor | None:
        """The bias of the scores of the last T of S tokens, (B or 1, H, T, S); None without one, or where slopes do it.

        by_position: distances follow positions, not columns; they differ where documents share a beginning.
        """
        if not by_position:
            return None if self.relative is None else self.relative(T, positions.shape[-1])
        return distance_bias(self.relative, self.n_alibi, positions, T)

    def _rotary_table(self, window: int | None, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the queries' positions; Gemma 3 has another base in layers with a window."""
        table = self.rotary if window is None else self.rotary_local
        return None if table is None else table(positions)


class PassOn(nn.Module):
    """The input, in place of a block or norm that another stage of a pipeline computes."""

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        return x


def _window(config: ModelConfig, layer: int) -> int | None:
    """The window of a layer in tokens: every `full_every`th layer has none, and sees everything (Gemma 3, ModernBERT)."""
    return None if layer in config.full_layers else config.window


def _build_added_positions(config: ModelConfig) -> nn.Embedding | partial | None:
    """The module or function from positions to what is added to the embeddings; None for kinds that act in attention."""
    if config.position is Position.learned:
        if config.position_offset:
            return OffsetEmbedding(config.max_seq_len, config.embedding_size, offset=config.position_offset)
        return nn.Embedding(config.max_seq_len, config.embedding_size)
    if config.position is Position.sinusoidal:
        return partial(sinusoidal, n_embd=config.embedding_size)
    return None


def _build_rotary(config: ModelConfig) -> tuple[partial | None, partial | None]:
    """Functions from positions to rotary tables, for layers without and with a window; None for other positions."""
    if config.position is not Position.rotary:
        return None, None
    table = partial(rotary, head_dim=config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling)
    if config.rope_theta_local is None:
        return table, table
    return table, partial(rotary, head_dim=config.head_dim, theta=config.rope_theta_local)
