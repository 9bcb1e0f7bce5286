"""Check that a model of transformers computes with our attention what it computes with its own.

Any architecture may be loaded, and none is known to us by name, so a few tokens are run both ways before the first use:
plain rows, packed documents, padded rows, and rows that continue from a cache that was rewound and reordered. A model that
differs is refused with the reason, which docs/model_hf.md lists for all families.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.models.hf.transformers_attention import Packing

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from genai_pl.models.hf.transformers_model import WrappedDecoder

N = 8  # tokens of a document: few, as the model may be large
PAD = 3  # tokens of padding
TOLERANCE = 1e-3  # of logits, relative to their spread over the vocabulary


@torch.no_grad()
def check(model: "WrappedDecoder", name: str) -> "WrappedDecoder":
    """The model in evaluation mode, if our attention gives the logits of transformers' own; else ConfigError.

    name: the folder or hub id, for the error. Comparison is in float32, layer by layer, whatever the model's dtype.
    """
    virtual, model.virtual = model.virtual, None  # transformers does not know them
    try:
        with exact(model):
            fault = _fault(model.eval())
    except Exception as error:  # anybody's code may stumble over our masks, cache or arguments, and each in its way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fault = reason if isinstance(error, ConfigError) else f"it cannot take our attention ({reason})"
    finally:
        model.virtual = virtual
    if fault:
        raise refusal(name, fault)
    return model


def refusal(name: str, fault: str) -> ConfigError:
    """The error of one line for a model that does not run here."""
    return ConfigError(
        f"model.name={name}: this architecture does not run here: {fault}; docs/model_hf.md has those that do"
    )


def _fault(model: "WrappedDecoder") -> str | None:
    """The first difference from transformers' attention, in words, or None."""
    if not isinstance(model.lm_head, nn.Module):
        return "it has no head that makes logits"
    tokens = _tokens(model).view(2, N)
    with their_attention(model.inner):
        expected = model.inner(input_ids=tokens, use_cache=False).logits
    if not expected.isfinite().all():
        return f"its logits are not finite in {expected.dtype}, whoever computes attention"
    actual = model(tokens)
    if _near(actual, expected):
        return _packing_fault(model, tokens, expected) or _cache_fault(model, tokens, expected)
    # they differ: find out where, for the message
    options = {"attention_mask": torch.ones_like(tokens), "use_cache": False}
    options["packing"] = Packing(None, model.config.attention.value)
    if not _near(model.inner(input_ids=tokens, **options).logits, expected):
        return "its logits are others with our attention"
    if not _near(model.inner(inputs_embeds=model.embed(tokens), **options).logits, expected):
        return "its layers read more of a token than its embedding"
    return "its head does more than one product, which objectives here rely on"


def _packing_fault(model: "WrappedDecoder", tokens: Tensor, expected: Tensor) -> str | None:
    """The fault of two documents packed into a row, or of one after padding, or None; expected: logits of plain rows."""
    documents = torch.tensor([[1] * N + [2] * N], device=tokens.device)
    packed = model(tokens.reshape(1, 2 * N), documents).view_as(expected)
    if not _near(packed, expected):
        return "documents that are packed into one row come out otherwise than alone"
    rows, segments = _padded(tokens, N)
    padded = model(rows, segments)
    if not (_near(padded[0, PAD:], expected[0, : N - PAD]) and _near(padded[1], expected[1])):
        return "texts after padding come out otherwise than without"
    return None


def _cache_fault(model: "WrappedDecoder", tokens: Tensor, expected: Tensor) -> str | None:
    """The fault of tokens that follow a cache, which is rewound by one and whose rows are exchanged, or None."""
    first = N - 2
    rows, segments = _padded(tokens, N)
    new = rows[:, first:]
    cache = model.new_cache(2, N)
    logits = [model(rows[:, :first], segments[:, :first], cache=cache)[:, -1:], model(new[:, :1], cache=cache)]
    cache.rewind(1)
    cache.reorder(torch.tensor([1, 0], device=tokens.device))
    logits += [model(part, cache=cache).flip(0) for part in new.flip(0).split(1, dim=1)]
    token_positions = torch.tensor([first - 1, first, first, first + 1], device=tokens.device)
    actual = torch.cat(logits, dim=1)
    if not (_near(actual[0], expected[0, token_positions - PAD]) and _near(actual[1], expected[1, token_positions])):
        return "it cannot go on from keys and values of the tokens before"
    return None


def _padded(tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Rows (2, length), the first shifted right after PAD tokens of padding, and their segments."""
    rows, segments = tokens.clone(), torch.ones_like(tokens)
    rows[0] = torch.cat([tokens[0, :1].expand(PAD), tokens[0, : length - PAD]])
    segments[0, :PAD] = 0
    return rows, segments


def _near(actual: Tensor, expected: Tensor) -> bool:
    """True if all logits (..., V) are near the expected ones, up to a constant per token, which a softmax ignores."""
    actual, expected = (x - x.mean(dim=-1, keepdim=True) for x in (actual, expected))
    far = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    return bool(far.max() <= TOLERANCE)  # NaN compares as False


def _tokens(model: "WrappedDecoder") -> Tensor:
    """Tokens (2 * N,) from all over the vocabulary, without special ones, which some models embed or mask differently."""
    values = [item for config in _configs(model.inner) for item in config.to_dict().items()]
    special = {value for name, value in values if "token" in name and isinstance(value, int)}
    V = model.config.vocab_size
    spread = torch.linspace(V // 8, V - V // 8 - 1, 4 * N).long().tolist()
    plain = [token for token in spread if token not in special]
    return torch.tensor((plain * 2 * N)[: 2 * N], device=model.embed.weight.device)


def _configs(inner: "PreTrainedModel") -> list["PreTrainedConfig"]:
    """The configuration objects of all parts of a model, each once."""
    from transformers import PreTrainedConfig

    parts = (getattr(module, "config", None) for module in inner.modules())
    return list({id(part): part for part in parts if isinstance(part, PreTrainedConfig)}.values())


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Inside, modules compute with float32 copies of their parameters, each for the time of its call.

    bfloat16 is too coarse to tell another architecture from rounding, and a float32 copy of the whole model may not fit.
    """
    original: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, _: object) -> None:
        """Before a module's call: float32 parameters."""
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in (torch.bfloat16, torch.float16):
                original[parameter], parameter.data = parameter.data, parameter.data.float()

    def narrow(module: nn.Module, *_: object) -> None:
        """After the call, also one that fails: the original parameters."""
        for parameter in module.parameters(recurse=False):
            parameter.data = original.pop(parameter, parameter.data)

    hooks = [module.register_forward_pre_hook(widen) for module in model.modules()]
    hooks += [module.register_forward_hook(narrow, always_call=True) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def their_attention(inner: "PreTrainedModel") -> Iterator[None]:
    """Inside, transformers computes attention by its own eager code."""
    configs = _configs(inner)
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
