"""Virtual tokens as adapters: the common part of prompt and prefix tuning, and the one tensor of their files.

A virtual token has no id. Prompt tuning learns its embedding, prefix tuning its keys and values in every layer; the model
inserts them (models/virtual_tokens.py), and the adapter's switch decides in which rows.
"""

from torch import Tensor, nn

from genai_pl.config.enums import AttentionKind, Position
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models import Encoder, EncoderDecoder, WrappedDecoder
from genai_pl.models.transformer import Transformer
from genai_pl.models.virtual_tokens import VirtualTokens
from genai_pl.peft.adapter import Adapter, AdapterLayer
from genai_pl.peft.adapter_layers import TrainedCopy, train_whole
from genai_pl.peft.io.hf_names import PREFIX, HFModule, hf_modules
from genai_pl.peft.io.modules_to_save import load_saved_modules, saved_module_tensors
from genai_pl.peft.io.tensors import AdapterFile, TensorReader, common_config, layer_of

KEY = "prompt_embeddings"  # the one tensor of virtual tokens
HEAD = "base_model."  # before the names of a head's tensors, where there is one


class VirtualAdapter(AdapterLayer, VirtualTokens):
    """Base class of learned virtual tokens with an adapter's switch, whose weights must be 0 or 1.

    n_tokens: P. A factor in between has no meaning: attention to a token is present or absent.
    """

    def __init__(self, adapter: Adapter, n_tokens: int) -> None:
        super().__init__()
        self.adapter, self.n_tokens = adapter, n_tokens

    def is_off(self) -> bool:
        """True if no row has the virtual tokens."""
        return self.adapter.is_off

    def rows(self) -> Tensor | None:
        """(B,) bool, the rows that have the virtual tokens; None for all. ConfigError for weights between 0 and 1."""
        weights = self.adapter.rows
        if not (self.adapter.weight == 1.0 if weights is None else ((weights == 0) | (weights == 1)).all()):
            raise ConfigError(
                f"peft={self.adapter.method}: the weight of this adapter must be 0 or 1: virtual tokens are there or not"
            )
        return None if weights is None else weights == 1


def stack_for(model: nn.Module, method: str, n_tokens: int, *, reads: bool) -> Transformer | WrappedDecoder:
    """The part of the model that takes virtual tokens; ConfigError if it cannot take any.

    reads: of an encoder-decoder, True for the encoder (prompt tuning, as PEFT), False for the decoder (prefix tuning).
    """
    stack = model
    if isinstance(model, EncoderDecoder):
        stack = model.encoder if reads else model.decoder
    # efficient attention and XLNet's relative positions have no place before the first token
    config = stack.config
    if config.attention_kind is not AttentionKind.full:
        raise ConfigError(f"peft={method} needs model.attention_kind=full, not {config.attention_kind.value}")
    if isinstance(stack, Transformer) and config.position is Position.xl:
        raise ConfigError(f"peft={method} has no place for its tokens in model.position=xl: choose peft=lora")
    if isinstance(stack, WrappedDecoder):
        stack.refuse_virtual(layers=not reads, embeddings=reads)
    if stack.virtual is not None:
        raise ConfigError(
            f"peft={method}: this model has virtual tokens of peft={stack.virtual.adapter.method} already"
        )
    # learned positions are shared with the tokens, so there must be fewer virtual tokens than positions
    capacity = stack.max_length
    if n_tokens < 1 or (capacity is not None and n_tokens >= capacity):
        limit = "" if capacity is None else f" and below model.max_seq_len ({capacity}), whose positions they share"
        raise ConfigError(f"peft.n_tokens must be at least 1{limit}, not {n_tokens}")
    return stack


def install(model: nn.Module, stack: Transformer, tokens: VirtualAdapter) -> nn.Module:
    """The model, frozen, with `tokens` as the virtual tokens of `stack`; a head for labels is trained whole beside them."""
    model.requires_grad_(False)
    stack.virtual = tokens.requires_grad_(True).train(stack.training)
    train_whole(model, [], tokens.adapter)
    return model


def virtual_of(model: nn.Module) -> VirtualAdapter:
    """The virtual tokens of a model that has some."""
    return next(module for module in model.modules() if isinstance(module, VirtualAdapter))


def config_of(model: nn.Module, peft_type: str, tokens: VirtualAdapter) -> dict[str, object]:
    """The keys of adapter_config.json that prompt and prefix tuning have in common."""
    config = common_config(model, peft_type) | {
        "num_virtual_tokens": tokens.n_tokens,
        "num_layers": model.config.n_layer,
    }
    # the only class of PEFT under which an encoder sees the tokens and its output keeps its length
    if isinstance(model, Encoder) and not model.config.head.scores:
        config["task_type"] = "FEATURE_EXTRACTION"
    return config


def head_tensors(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """The trained head for labels, as PEFT names its tensors beside virtual tokens; empty without such a head."""
    tensors = {}
    for module, layers in _head_modules(model, adapter):
        saved = saved_module_tensors(module, layers)
        tensors |= {f"{HEAD}{module.name}.{name}": value for name, value in saved.items()}
    return tensors


def fill_head(model: nn.Module, file: AdapterFile) -> None:
    """Copy the head's tensors of a file into the model with its virtual tokens; CheckpointError for missing or further ones."""
    adapter = virtual_of(model).adapter
    own = {PREFIX + name.removeprefix(HEAD): x for name, x in file.tensors.items() if name != KEY}
    modules = _head_modules(model, adapter)
    tensors = TensorReader(AdapterFile(file.config, own), [module for module, _ in modules], ("weight", "bias"))
    for module, layers in modules:
        load_saved_modules(module, layers, tensors)
    tensors.finish()


def _head_modules(model: nn.Module, adapter: Adapter) -> list[tuple[HFModule, list[TrainedCopy | None]]]:
    """The modules of transformers that the adapter trains whole, with their layers here."""
    if not model.config.head.scores:
        return []
    found = [(module, [layer_of(site, adapter) for site in module.parts]) for module in hf_modules(model)]
    return [(module, layers) for module, layers in found if any(isinstance(layer, TrainedCopy) for layer in layers)]


def table_in(file: AdapterFile) -> tuple[Tensor, int]:
    """The tensor of virtual tokens, (rows, width), and their number; CheckpointError for other content than it and a head."""
    tensors, n_tokens = file.tensors, file.config.get("num_virtual_tokens")
    if {name for name in tensors if not name.startswith(HEAD)} != {KEY}:
        raise CheckpointError(f"there must be a tensor {KEY} and no other, not {', '.join(sorted(tensors)) or 'none'}")
    table = tensors[KEY]
    if not isinstance(n_tokens, int) or table.dim() != 2 or not 1 <= n_tokens <= len(table):
        raise CheckpointError(f"{KEY} has shape {list(table.shape)}, which does not fit num_virtual_tokens={n_tokens}")
    return table, n_tokens
