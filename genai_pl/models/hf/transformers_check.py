"""Check that a wrapped model computes what transformers computes by its own eager attention, and the choice of its route.

Any architecture may be loaded, and none is known to us by name, so a few tokens are run both ways before the first use:
plain rows, packed documents, padded rows, and rows that continue from a cache that was reordered and rewound. What differs
is computed on a slower route that is exact for every causal model: transformers' attention instead of ours, a row for each
document, the whole text for each token. A model that differs even so is refused; docs/families.md lists all families.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from genai_pl.config.enums import AttentionBackend
from genai_pl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from genai_pl.models.hf.transformers_model import WrappedDecoder

N = 8  # tokens of a document: few, as the model may be large
PAD = 3  # tokens of padding
TOLERANCE = 1e-3  # of logits, relative to their spread over the vocabulary
FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier")  # fields that multiply the logits, or divide them
HEAD = "its head does more than one product, which objectives here rely on"


@torch.no_grad()
def check(model: "WrappedDecoder", name: str) -> "WrappedDecoder":
    """The model in evaluation mode, on the fastest route that gives the logits of transformers; ConfigError if none does.

    name: the folder or hub id, for the error. Comparison is in float32, layer by layer, whatever the model's dtype.
    """
    virtual, model.virtual = model.virtual, None  # transformers does not know them
    try:
        with exact(model):
            fault = _choose_route(model.eval())
    finally:
        model.virtual = virtual
    if fault:
        raise refusal(name, fault)
    return model


def refusal(name: str, fault: str) -> ConfigError:
    """The error of one line for a model that does not run here."""
    return ConfigError(
        f"model.name={name}: this architecture does not run here: {fault}; docs/families.md has those that do"
    )


def _choose_route(model: "WrappedDecoder") -> str | None:
    """The reason why no route is exact, in words, or None once `model.route` is one that is."""
    if not isinstance(model.lm_head, nn.Module):
        return "it has no head that makes logits"
    tokens = _tokens(model).view(2, N)
    try:
        with their_attention(model.inner):
            expected = model.inner(input_ids=tokens, use_cache=False).logits
    except Exception as error:  # anybody's code
        return f"transformers does not run it on tokens alone ({reason_of(error)})"
    if not expected.isfinite().all():
        return f"its logits are not finite in {expected.dtype}, whoever computes attention"
    # attention: ours or theirs
    fault = _attempt(partial(_logits_fault, model, tokens, expected))
    if fault and model.route.ours:
        model.leave_attention(fault)
        fault = _attempt(partial(_logits_fault, model, tokens, expected))
    if fault:
        return fault
    asked = model.config.attention
    if not model.route.ours and asked is not AttentionBackend.auto:
        return f"{model.route.notes[0]}, and model.attention={asked.value} asks for ours: set model.attention=auto"
    if fault := _attempt(partial(_causal_fault, model, tokens, expected)):
        return fault
    # documents and padding
    packing = partial(_packing_fault, model, tokens, expected)
    if model.route.masks_documents and (fault := _attempt(packing)):
        _leave(model, "documents of a packed row get a row each", fault, "masks_documents")
    if not model.route.masks_documents and (fault := _attempt(packing)):
        return fault
    # the past, after padding and without it
    padded, plain = (partial(_cache_fault, model, tokens, expected, pad=pad) for pad in (PAD, 0))
    if padded_fault := _attempt(padded):
        if fault := _attempt(plain):
            _leave(model, "each new token reads the whole text again", fault, "caches", "caches_padding")
        else:
            _leave(model, "after padding each new token reads the whole text again", padded_fault, "caches_padding")
        if fault := _attempt(padded):
            return fault
    # embeddings
    if fault := _attempt(partial(_embedding_fault, model, tokens, expected)):
        _leave(model, "there are no virtual tokens", fault, "takes_embeddings")
    return None


def _leave(model: "WrappedDecoder", consequence: str, fault: str, *fields: str) -> None:
    """Set fields of the route to False, with a note on the consequence and the reason."""
    notes = (*model.route.notes, f"{consequence}: {fault}")
    model.route = replace(model.route, **dict.fromkeys(fields, False), notes=notes)


def _attempt(probe: Callable[[], str | None]) -> str | None:
    """The fault that a probe finds or stumbles over: anybody's code takes our masks and arguments each in its way."""
    try:
        return probe()
    except Exception as error:
        return reason_of(error) if isinstance(error, ConfigError) else f"it stops ({reason_of(error)})"


def reason_of(error: Exception) -> str:
    """The first line of an error, with the second where it announces one; or its kind."""
    if "ignore_mismatched_sizes" in str(error):  # transformers' line sends to a table
        return "a tensor in its files has another shape than config.json asks for"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _logits_fault(model: "WrappedDecoder", tokens: Tensor, expected: Tensor) -> str | None:
    """The difference of plain rows, or None; finds the factor of the logits, which families write as one or its inverse."""
    hidden = model.features(tokens)
    if not _near_head(model, hidden, expected):
        return "its logits are others with our attention" if model.route.ours else HEAD
    return None


def _near_head(model: "WrappedDecoder", hidden: Tensor, expected: Tensor) -> bool:
    """True if the head gives the expected logits with a factor and cap of the configuration, which it then has.

    A family may ignore a key that another one has: no cap is tried, too.
    """
    values = model.inner.config.get_text_config(decoder=True)
    given = [float(v) for name in FACTORS if isinstance(v := getattr(values, name, None), int | float) and v]
    factors, cap = (1.0, *given, *(1 / v for v in given)), model.config.logit_softcap
    for tried, factor in product(dict.fromkeys((cap, None)), factors):
        model.config.logit_softcap, model.config.logit_factor = tried, factor
        if _near(model.logits(hidden), expected):
            return True
    model.config.logit_softcap, model.config.logit_factor = cap, 1.0
    return False


def _causal_fault(model: "WrappedDecoder", tokens: Tensor, expected: Tensor) -> str | None:
    """The fault of the beginning of rows, whose logits must not depend on what follows, or None."""
    is_equal = _near(model(tokens[:, : N - 2]), expected[:, : N - 2])
    return None if is_equal else "its tokens see those that come later"


def _packing_fault(model: "WrappedDecoder", tokens: Tensor, expected: Tensor) -> str | None:
    """The fault of two documents packed into a row, or of one after padding, or None; expected: logits of plain rows."""
    first = N - 3
    documents = torch.tensor([[1] * first + [2] * N], device=tokens.device)
    packed = model(torch.cat([tokens[:1, :first], tokens[1:]], dim=1), documents)[0]
    if not (_near(packed[:first], expected[0, :first]) and _near(packed[first:], expected[1])):
        return "documents that are packed into one row come out otherwise than alone"
    rows, segments = _padded(tokens, N, PAD)
    padded = model(rows, segments)
    if not (_near(padded[0, PAD:], expected[0, : N - PAD]) and _near(padded[1], expected[1])):
        return "texts after padding come out otherwise than without"
    return None


def _cache_fault(model: "WrappedDecoder", tokens: Tensor, expected: Tensor, *, pad: int) -> str | None:
    """The fault of tokens that follow a cache, which is rewound by one and whose rows are exchanged, or None.

    pad: tokens of padding before the first row.
    """
    first = N - 2
    rows, segments = _padded(tokens, N, pad)
    new, segments = rows[:, first:], segments[:, :first] if pad else None
    cache = model.new_cache(2, N)
    logits = [model(rows[:, :first], segments, cache=cache)[:, -1:], model(new[:, :1], cache=cache)]
    cache.rewind(1)
    cache.reorder(torch.tensor([1, 0], device=tokens.device))
    logits += [model(part, cache=cache).flip(0) for part in new.flip(0).split(1, dim=1)]
    token_positions = torch.tensor([first - 1, first, first, first + 1], device=tokens.device)
    actual = torch.cat(logits, dim=1)
    if not (_near(actual[0], expected[0, token_positions - pad]) and _near(actual[1], expected[1, token_positions])):
        return "it cannot go on from what it keeps of the tokens before"
    return None


def _embedding_fault(model: "WrappedDecoder", tokens: Tensor, expected: Tensor) -> str | None:
    """The fault of embeddings that are given instead of tokens, or None."""
    is_equal = _near(model.logits(model._pass(tokens, None, embedded=True)), expected)
    return None if is_equal else "its layers read more of a token than its embedding"


def _padded(tokens: Tensor, length: int, pad: int) -> tuple[Tensor, Tensor]:
    """Rows (2, length), the first shifted right after `pad` tokens of padding, and their segments."""
    rows, segments = tokens.clone(), torch.ones_like(tokens)
    rows[0] = torch.cat([tokens[0, :1].expand(pad), tokens[0, : length - pad]])
    segments[0, :pad] = 0
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
