"""Model configuration: every choice that determines shapes and arithmetic, as plain data.

The same dataclass is the group `model` on the command line, the `model` entry of a checkpoint and the result of
reading a Hugging Face config.json. The comments of its fields are the help texts of the options.
"""

from dataclasses import dataclass, field
from typing import Any

from genai_pl.config.enums import (
    Activation,
    AttentionBackend,
    AttentionKind,
    Head,
    Norm,
    NormOrder,
    Position,
    Router,
    Shape,
)
from genai_pl.config.rope_scaling import RopeScaling
from genai_pl.config.values import MAX_LAYERS, MAX_SIZE, check_numbers, check_positive, parse_enums, to_json_values
from genai_pl.errors import ConfigError

POSITIVE_FIELDS = (
    "n_layer", "n_decoder_layer", "n_head", "n_kv_head", "n_embd", "embedding_size", "head_dim", "intermediate_size",
    "vocab_size", "max_seq_len", "rope_theta", "rope_theta_local", "relative_buckets", "relative_max_distance", "norm_eps",
    "attention_scale", "window", "full_every", "linformer_rank", "performer_features", "reformer_hashes", "reformer_bucket",
    "softcap", "logit_softcap", "init_std", "experts_per_token", "expert_size", "expert_every", "router_scale",
    "n_labels", "swiglu_alpha", "swiglu_limit",
)  # fmt: skip
# fields of a mixture of experts, of no effect where n_experts is null
EXPERT_FIELDS = (
    "experts_per_token", "n_shared_experts", "expert_size", "expert_every", "n_dense_layers", "router", "router_scale",
    "normalize_top_k", "router_bias", "balance_loss", "router_z_loss", "balance_bias",
)  # fmt: skip


@dataclass
class ModelConfig:
    """Sizes, layers and options of a model. Fields left null are derived in __post_init__, so a built
    configuration is complete.

    Lengths and sizes are in tokens and features. Raises ConfigError, with the option's name, for a value out of
    range and for fields that exclude each other.
    """

    shape: Shape = Shape.decoder
    n_layer: int = 12
    n_decoder_layer: int | None = None  # decoder layers of an encoder_decoder; null: n_layer
    n_head: int = 12
    n_kv_head: int | None = None  # null: n_head (no grouping)
    n_embd: int = 768
    embedding_size: int | None = None  # narrower embeddings, projected to n_embd (Lan et al. 2020); null: n_embd
    head_dim: int | None = None  # null: n_embd / n_head
    intermediate_size: int | None = None  # null: 4 n_embd, or 8/3 n_embd to a multiple of 32 when gated
    vocab_size: int | None = None  # null: the tokenizer's
    max_seq_len: int = 1024
    eos_token_ids: tuple[int, ...] = ()  # each ends a text; set from the tokenizer and the model's folder
    n_token_types: int = 0  # segment types of an encoder (BERT: 2)
    share_layers: bool = False  # one block, used n_layer times (Lan et al. 2020)
    position: Position = Position.learned
    position_offset: int = 0  # index of the first token's learned position (RoBERTa: 2)
    rope_theta: float = 10000.0
    rope_theta_local: float | None = None  # rope_theta of windowed layers, never scaled; null: rope_theta
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    relative_buckets: int = 32  # buckets of position=relative
    relative_max_distance: int = 128
    norm: Norm = Norm.layernorm
    norm_order: NormOrder = NormOrder.pre
    norm_eps: float = 1e-5
    first_norm: bool = True  # norm before the attention of the first block (ModernBERT has none there)
    embed_norm: bool = False  # normalize the sum of the embeddings
    scale_embeddings: bool = False  # multiply embeddings by sqrt(n_embd)
    activation: Activation = Activation.gelu_tanh
    gated_mlp: bool = False
    swiglu_alpha: float = 1.702  # activation=clamped_swiglu: factor in the sigmoid
    swiglu_limit: float = 7.0  # activation=clamped_swiglu: bound of gate and up projection
    bias: bool = True  # biases in every linear layer and LayerNorm
    qkv_bias: bool | None = None  # null: as bias
    o_bias: bool | None = None  # null: as bias
    qk_norm: bool = False
    qk_norm_joint: bool = False  # qk_norm over all heads at once (OLMoE), not over each
    head: Head = Head.linear
    head_bias: bool = False
    n_labels: int = 1  # outputs of head=score and head=tokens
    score_dense: bool = False  # a dense layer with tanh before head=score (BERT's pooler, RoBERTa's classifier)
    score_transform: bool = False  # the layers of head=transform also before head=score and head=tokens (ModernBERT)
    score_mean: bool = False  # an encoder's head=score reads the mean of a text's states, not the first
    transform_bias: bool = True  # bias of the dense layer of head=transform
    scale_head: bool = False  # multiply hidden states by 1/sqrt(n_embd) before the head (T5)
    tie_embeddings: bool = True
    pooler: bool = False  # keep the folder's dense layer over the first state (BERT's pooler)
    decoder_start_token_id: int | None = None  # first decoder token of an encoder_decoder; null: the pad token
    attention_kind: AttentionKind = AttentionKind.full
    attention_scale: float | None = None  # scale of attention scores; null: 1/sqrt(head_dim)
    window: int | None = None  # tokens that a token attends to, itself included (in an encoder: to either side)
    full_every: int | None = None  # every n-th layer has no window (Gemma 3: 6)
    first_full: int | None = None  # index of the first of them (ModernBERT: 0); null: full_every - 1
    n_global: int = 0  # attention_kind=window: leading tokens with global attention
    linformer_rank: int = 64  # projected keys
    performer_features: int = 128  # random features per head
    reformer_hashes: int = 2
    reformer_bucket: int = 64  # positions per chunk
    attention_sinks: bool = False  # a learned score for each head, of one more key without value (gpt-oss)
    softcap: float | None = None  # tanh cap of attention scores
    logit_softcap: float | None = None
    n_experts: int | None = None  # experts in place of an MLP (Shazeer et al. 2017); null or 0: every MLP is dense
    experts_per_token: int = 2  # experts that a token is sent to
    n_shared_experts: int = 0  # further experts that every token passes: one MLP of so many times expert_size
    expert_size: int | None = None  # hidden channels of an expert; null: intermediate_size
    expert_every: int = 1  # every n-th layer has experts
    n_dense_layers: int = 0  # the first layers have none
    router: Router = Router.softmax
    router_scale: float = 1.0  # factor on the weights of a token's experts (DeepSeek-V3: 2.5)
    normalize_top_k: bool = True  # divide the weights of a token's experts by their sum
    router_bias: bool = False  # a bias of the router's logits (gpt-oss)
    balance_loss: float = 0.01  # coefficient of the load-balancing loss, of each layer (Fedus et al. 2021, eq. 4)
    router_z_loss: float = 0.0  # coefficient of the squared log-sum-exp of router logits (Zoph et al. 2022: 0.001)
    balance_bias: float = 0.0  # step of a bias that balances without a loss (DeepSeek-V3: 0.001); 0: no bias
    dropout: float = 0.0
    init_std: float = 0.02
    attention: AttentionBackend = AttentionBackend.auto
    extra: dict[str, Any] = field(default_factory=dict)  # other fields of its config.json, written on export

    def __post_init__(self) -> None:
        self.eos_token_ids = tuple(int(i) for i in self.eos_token_ids)
        parse_enums(self, "model")
        if not isinstance(self.rope_scaling, RopeScaling):
            self.rope_scaling = RopeScaling(**(self.rope_scaling or {}))
        check_positive(self, "model", POSITIVE_FIELDS)
        check_numbers(self, "model")
        self._derive()
        self._check_pairs()

    def _derive(self) -> None:
        """Fill in the sizes that are null: grouped heads, embedding and head sizes, the MLP's width."""
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.n_decoder_layer is None and self.shape is Shape.encoder_decoder:
            self.n_decoder_layer = self.n_layer
        if self.embedding_size is None:
            self.embedding_size = self.n_embd
        if self.qkv_bias is None:
            self.qkv_bias = self.bias
        if self.o_bias is None:
            self.o_bias = self.bias
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                sizes = f"model.n_embd ({self.n_embd}) must be divisible by model.n_head ({self.n_head})"
                raise ConfigError(f"{sizes}; change one of them, or set model.head_dim")
            self.head_dim = self.n_embd // self.n_head
        if self.intermediate_size is None:
            # 8/3 n_embd keeps the parameters of 4 n_embd, for a gated MLP has three matrices (Shazeer 2020)
            self.intermediate_size = 32 * -(-8 * self.n_embd // (3 * 32)) if self.gated_mlp else 4 * self.n_embd
        self.n_experts = self.n_experts or None
        if self.n_experts and self.expert_size is None:
            self.expert_size = self.intermediate_size

    def _check_pairs(self) -> None:
        """ConfigError for fields that cannot hold together."""
        # sizes
        if max(self.n_layer, self.n_decoder_layer or 0) > MAX_LAYERS:
            raise ConfigError(f"model.n_layer and model.n_decoder_layer are at most {MAX_LAYERS:,}")
        if min(self.n_token_types, self.n_global, self.position_offset) < 0:
            raise ConfigError("model.n_token_types, model.n_global and model.position_offset are at least 0")
        if self.n_head % self.n_kv_head:
            raise ConfigError(f"model.n_head ({self.n_head}) must be a multiple of model.n_kv_head ({self.n_kv_head})")
        # positions, and what exists in one shape only
        if self.position is Position.rotary and self.head_dim % 2:
            raise ConfigError(f"model.head_dim ({self.head_dim}) must be even for model.position=rotary")
        if self.position is Position.xl and self.shape is not Shape.encoder:
            raise ConfigError("model.position=xl needs model.shape=encoder")
        if self.pooler and self.shape is not Shape.encoder:
            raise ConfigError("model.pooler needs model.shape=encoder")
        if self.head.scores and self.shape is Shape.encoder_decoder:
            raise ConfigError(f"model.head={self.head.value} needs model.shape=decoder or encoder")
        if not 0 <= self.start_token(0) < (self.vocab_size or MAX_SIZE):
            raise ConfigError(f"model.decoder_start_token_id={self.decoder_start_token_id} is no token of the model")
        if self.n_decoder_layer is not None and self.shape is not Shape.encoder_decoder:
            raise ConfigError("model.n_decoder_layer needs model.shape=encoder_decoder")
        if self.qk_norm_joint and not self.qk_norm:
            raise ConfigError("model.qk_norm_joint needs model.qk_norm=true")
        # windows and approximations of attention
        if self.full_every and self.window is None:
            raise ConfigError("model.full_every needs model.window: without one every layer is full already")
        if self.first_full is not None and not 0 <= self.first_full < (self.full_every or 0):
            raise ConfigError(f"model.first_full={self.first_full} must lie below model.full_every ({self.full_every})")
        if (self.score_transform or self.score_mean) and self.shape is not Shape.encoder:
            raise ConfigError("model.score_transform and model.score_mean need model.shape=encoder")
        if not self.first_norm and self.norm_order is not NormOrder.pre:
            raise ConfigError("model.first_norm=false needs model.norm_order=pre")
        if self.attention_kind is AttentionKind.window and self.window is None:
            raise ConfigError("model.attention_kind=window needs model.window")
        if self.attention_sinks and (
            self.attention_kind is not AttentionKind.full or self.shape is Shape.encoder_decoder
        ):
            raise ConfigError("model.attention_sinks needs model.attention_kind=full, and a decoder or an encoder")
        if self.activation is Activation.clamped_swiglu and not (self.gated_mlp and self.head is not Head.transform):
            raise ConfigError("model.activation=clamped_swiglu needs model.gated_mlp=true, and no head=transform")
        if self.attention_kind is AttentionKind.linformer and self.shape is not Shape.encoder:
            raise ConfigError("model.attention_kind=linformer mixes all positions and needs model.shape=encoder")
        if self.attention_kind is AttentionKind.reformer and self.n_kv_head != self.n_head:
            raise ConfigError("model.attention_kind=reformer has its queries for keys: set model.n_kv_head=null")
        # embeddings, dropout and backends
        if self.share_layers and self.shape is not Shape.encoder:
            raise ConfigError("model.share_layers needs model.shape=encoder: a cache has one place per layer")
        if self.tie_embeddings and self.head is Head.linear and self.embedding_size != self.n_embd:
            raise ConfigError("model.embedding_size below n_embd needs model.head=transform or tie_embeddings=false")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"model.dropout must be in [0, 1), not {self.dropout}")
        uncapped = (AttentionBackend.sdpa, AttentionBackend.varlen, AttentionBackend.dense)
        if self.attention in uncapped and self.softcap is not None:
            name = self.attention.value
            raise ConfigError(f"model.attention={name} has no softcap: set model.attention=auto, or model.softcap=null")

        if self.n_experts:
            self._check_experts()

    def _check_experts(self) -> None:
        """ConfigError for fields of a mixture of experts that cannot hold together."""
        if not 1 <= self.experts_per_token <= self.n_experts:
            raise ConfigError(
                f"model.experts_per_token ({self.experts_per_token}) must be 1 to model.n_experts ({self.n_experts})"
            )
        if min(self.n_shared_experts, self.n_dense_layers) < 0:
            raise ConfigError("model.n_shared_experts and model.n_dense_layers are at least 0")
        if min(self.balance_loss, self.router_z_loss, self.balance_bias) < 0:
            raise ConfigError("model.balance_loss, model.router_z_loss and model.balance_bias are at least 0")
        if self.share_layers:
            raise ConfigError("model.n_experts needs layers of their own: set model.share_layers=false")
        if not self.mixture_layers:
            raise ConfigError("model.n_experts: no layer is left for them; lower model.n_dense_layers or expert_every")

    @property
    def mixture_layers(self) -> range:
        """The layers that have experts, by number."""
        if not self.n_experts:
            return range(0)
        n = max(self.n_layer, self.n_decoder_layer or 0)
        # the first layer number l >= n_dense_layers with l + 1 a multiple of expert_every
        first = self.expert_every * (self.n_dense_layers // self.expert_every + 1) - 1
        return range(first, n, self.expert_every)

    @property
    def full_layers(self) -> range:
        """The layers without a window, by number, where `full_every` names them."""
        if self.full_every is None:
            return range(0)
        first = self.full_every - 1 if self.first_full is None else self.first_full
        return range(first, max(self.n_layer, self.n_decoder_layer or 0), self.full_every)

    @property
    def writes(self) -> bool:
        """True if the model can continue text token by token: a decoder side with a language-model head."""
        return self.shape is not Shape.encoder and self.head.predicts_tokens

    @property
    def is_reward(self) -> bool:
        """True if the model gives a text one number."""
        return self.head is Head.score and self.n_labels == 1

    def start_token(self, pad: int) -> int:
        """First token of the decoder beside an encoder. pad: the tokenizer's pad token, T5's start token (Raffel
        et al. 2020).
        """
        return pad if self.decoder_start_token_id is None else self.decoder_start_token_id

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON values, enums by name: what a checkpoint stores."""
        return to_json_values(self)

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> "ModelConfig":
        """The configuration from `to_dict`'s values; ConfigError for unknown fields and values of other types."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ConfigError(f"unknown model field {min(unknown)!r}")
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"bad model configuration: {error}") from None
