"""What prompt and prefix tuning share: an adapter of virtual tokens, where it goes in a model, and its file."""

from torch import Tensor, nn

from genai_pl.config.enums import AttentionKind, Position
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models import Encoder, EncoderDecoder, WrappedDecoder
from genai_pl.models.transformer import Transformer
from genai_pl.models.virtual_tokens import VirtualTokens
from genai_pl.peft.adapter import Adapter, AdapterLayer
from genai_pl.peft.io.tensors import AdapterFile, common_config

KEY = "prompt_embeddings"  # the one tensor of the file


class VirtualAdapter(AdapterLayer, VirtualTokens):
    """Virtual tokens that an adapter's weight, 0 or 1, switches off or on, for each row if need be."""

    def __init__(self, adapter: Adapter, n_tokens: int) -> None:
        super().__init__()
        self.adapter, self.n_tokens = adapter, n_tokens

    def is_off(self) -> bool:
        return self.adapter.is_off

    def rows(self) -> Tensor | None:
        weights = self.adapter.rows
        if not (self.adapter.weight == 1.0 if weights is None else ((weights == 0) | (weights == 1)).all()):
            raise ConfigError(
                f"peft={self.adapter.method}: the weight of this adapter must be 0 or 1: virtual tokens are there or not"
            )
        return None if weights is None else weights == 1


def stack_for(model: nn.Module, method: str, n_tokens: int, *, reads: bool) -> Transformer | WrappedDecoder:
    """Where virtual tokens go, in an encoder-decoder the half that reads or the one that writes; ConfigError if nowhere."""
    stack = model
    if isinstance(model, EncoderDecoder):
        stack = model.encoder if reads else model.decoder
    config = stack.config
    if config.attention_kind is not AttentionKind.full:
        raise ConfigError(f"peft={method} needs model.attention_kind=full, not {config.attention_kind.value}")
    if isinstance(stack, Transformer) and config.position is Position.xl:
        raise ConfigError(f"peft={method} has no place for its tokens in model.position=xl: choose peft=lora")
    if stack.virtual is not None:
        raise ConfigError(
            f"peft={method}: this model has virtual tokens of peft={stack.virtual.adapter.method} already"
        )
    capacity = stack.max_length
    if n_tokens < 1 or (capacity is not None and n_tokens >= capacity):
        limit = "" if capacity is None else f" and below model.max_seq_len ({capacity}), whose positions they share"
        raise ConfigError(f"peft.n_tokens must be at least 1{limit}, not {n_tokens}")
    return stack


def install(model: nn.Module, stack: Transformer, tokens: VirtualAdapter) -> nn.Module:
    """The model, frozen, with the virtual tokens in it."""
    model.requires_grad_(False)
    stack.virtual = tokens.requires_grad_(True).train(stack.training)
    return model


def virtual_of(model: nn.Module) -> VirtualAdapter:
    """The virtual tokens of a model that has some."""
    return next(module for module in model.modules() if isinstance(module, VirtualAdapter))


def config_of(model: nn.Module, peft_type: str, tokens: VirtualAdapter) -> dict[str, object]:
    """What both kinds say in adapter_config.json."""
    config = common_config(model, peft_type) | {
        "num_virtual_tokens": tokens.n_tokens,
        "num_layers": model.config.n_layer,
    }
    if isinstance(
        model, Encoder
    ):  # the only of PEFT's classes that has an encoder see the tokens and leaves its output
        config["task_type"] = "FEATURE_EXTRACTION"
    return config


def table_in(file: AdapterFile) -> tuple[Tensor, int]:
    """The one tensor of the file, (rows, width), and how many virtual tokens it is for."""
    tensors, n_tokens = file.tensors, file.config.get("num_virtual_tokens")
    if set(tensors) != {KEY}:
        raise CheckpointError(f"there must be a tensor {KEY} and no other, not {', '.join(sorted(tensors)) or 'none'}")
    table = tensors[KEY]
    if not isinstance(n_tokens, int) or table.dim() != 2 or not 1 <= n_tokens <= len(table):
        raise CheckpointError(f"{KEY} has shape {list(table.shape)}, which does not fit num_virtual_tokens={n_tokens}")
    return table, n_tokens
