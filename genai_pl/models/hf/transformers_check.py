"""Whether a model of transformers computes with our attention what it computes with its own."""

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

N = 8  # tokens of a document: a few, as the model may be large
PAD = 3  # tokens of padding
TOLERANCE = 1e-3  # of logits, relative to their spread over the vocabulary


@torch.no_grad()
def check(model: "WrappedDecoder", name: str) -> "WrappedDecoder":
    """The model in evaluation mode, if it computes what it does with transformers' own attention; else ConfigError.

    Compared are logits of plain, packed and padded rows, and of tokens that follow a cache.
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
    """The one line that says why a model is not run."""
    return ConfigError(
        f"model.name={name}: this architecture does not run here: {fault}; docs/model_hf.md has those that do"
    )


def _fault(model: "WrappedDecoder") -> str | None:
    """What the model does otherwise than with transformers' attention, or None."""
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
    options = {"attention_mask": torch.ones_like(tokens), "use_cache": False}
    options["packing"] = Packing(None, model.config.attention.value)
    if not _near(model.inner(input_ids=tokens, **options).logits, expected):
        return "its logits are others with our attention"
    if not _near(model.inner(inputs_embeds=model.embed(tokens), **options).logits, expected):
        return "its layers read more of a token than its embedding"
    return "its head does more than one product, which objectives here rely on"


def _packing_fault(model: "WrappedDecoder", tokens: Tensor, expected: Tensor) -> str | None:
    """What happens to two documents in a row, and to one behind padding."""
    documents = torch.tensor([[1] * N + [2] * N], device=tokens.device)
    packed = model(tokens.reshape(1, 2 * N), documents).view_as(expected)
    if not _near(packed, expected):
        return "documents that are packed into one row come out otherwise than alone"
    rows, segments = _padded(tokens, N)
    padded = model(rows, segments)
    if not (_near(padded[0, PAD:], expected[0, : N - PAD]) and _near(padded[1], expected[1])):
        return "texts behind padding come out otherwise than without"
    return None


def _cache_fault(model: "WrappedDecoder", tokens: Tensor, expected: Tensor) -> str | None:
    """What happens to tokens that follow a cache, from which some are taken again and whose rows change places."""
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
    """Rows (2, length) of which the first stands behind padding, and their segments."""
    rows, segments = tokens.clone(), torch.ones_like(tokens)
    rows[0] = torch.cat([tokens[0, :1].expand(PAD), tokens[0, : length - PAD]])
    segments[0, :PAD] = 0
    return rows, segments


def _near(actual: Tensor, expected: Tensor) -> bool:
    """Whether all tokens' logits (..., V) are those wanted, but for what softmax takes no notice of."""
    actual, expected = (x - x.mean(dim=-1, keepdim=True) for x in (actual, expected))
    far = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    return bool(far.max() <= TOLERANCE)  # no number is not near


def _tokens(model: "WrappedDecoder") -> Tensor:
    """Tokens (2 * N,) from all over the vocabulary, without those that the configuration has a name for."""
    values = [item for config in _configs(model.inner) for item in config.to_dict().items()]
    special = {value for name, value in values if "token" in name and isinstance(value, int)}
    V = model.config.vocab_size
    spread = torch.linspace(V // 8, V - V // 8 - 1, 4 * N).long().tolist()
    plain = [token for token in spread if token not in special]
    return torch.tensor((plain * 2 * N)[: 2 * N], device=model.embed.weight.device)


def _configs(inner: "PreTrainedModel") -> list["PreTrainedConfig"]:
    """The configurations that the parts of a model read, each once."""
    from transformers import PreTrainedConfig

    parts = (getattr(module, "config", None) for module in inner.modules())
    return list({id(part): part for part in parts if isinstance(part, PreTrainedConfig)}.values())


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Inside, modules calculate with float32 copies of their parameters, each as long as its call: bfloat16 is too coarse
    to tell another architecture from rounding."""
    original: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, _: object) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in (torch.bfloat16, torch.float16):
                original[parameter], parameter.data = parameter.data, parameter.data.float()

    def narrow(module: nn.Module, *_: object) -> None:
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
    """Inside, transformers computes attention itself."""
    configs = _configs(inner)
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
