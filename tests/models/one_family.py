"""One family of transformers under model=hf against transformers' own attention, in all that a run does with a model."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from test_against_transformers import shaken
from tiny_families import tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.generation import generate
from genai_pl.models.hf.transformers_model import load_wrapped, save_wrapped

T, SPLIT, PAD, NEW = 13, 6, 4, 16
MAX_PARAMETERS = 3_000_000


class NotTried(Exception):
    """A family that transformers does not build or run in a small size."""


def built(kind: str, **values: object) -> nn.Module:
    """A small random model of transformers with its own attention; NotTried if that cannot be had."""
    eager = {"attn_implementation": "eager"}
    try:
        config = tiny_config(kind, **values)
        with torch.device("meta"):
            n = sum(p.numel() for p in AutoModelForCausalLM.from_config(config, **eager).parameters())
        if n > MAX_PARAMETERS:
            raise NotTried(f"{n // 10**6}M parameters at least")
        model = shaken(AutoModelForCausalLM.from_config(config, **eager))
        with torch.no_grad():
            finite = model(torch.arange(3, 3 + T)[None]).logits.isfinite().all()
    except NotTried:
        raise
    except Exception as error:  # of whatever kind the family raises
        raise NotTried(" ".join(str(error).split())[:90]) from None
    if not finite:
        raise NotTried("random weights give no numbers")
    return model


def refusal_or_faults(theirs: nn.Module, folder: Path) -> str | list[str]:
    """The line that refuses a model, or the names of the checks that it fails, [] if none."""
    theirs.save_pretrained(folder / "theirs")
    try:
        ours = load_wrapped(str(folder / "theirs"))
    except CheckpointError as error:
        raise NotTried(str(error).partition("(")[2][:90]) from None
    except ConfigError as error:
        return str(error)
    # as it is read again: saving and loading alone may change a model (Youtu)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "theirs", attn_implementation="eager").eval()
    tokens = torch.randint(
        3, theirs.get_input_embeddings().weight.shape[0], (2, T), generator=torch.Generator().manual_seed(1)
    )
    checks = {"logits": logits, "packed": packed, "padded": padded, "written": written, "gradients": gradients}
    faults = [name for name, is_equal in checks.items() if not is_equal(theirs, ours, tokens)]
    save_wrapped(ours, folder / "ours")
    again = AutoModelForCausalLM.from_pretrained(folder / "ours", attn_implementation="eager").eval()
    return faults + ([] if near(again(tokens).logits, theirs(tokens).logits) else ["saved"])


def near(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= 1e-3 * expected.abs().max())


@torch.no_grad()
def logits(theirs: nn.Module, ours: nn.Module, tokens: Tensor) -> bool:
    return near(ours(tokens), theirs(tokens).logits)


@torch.no_grad()
def packed(theirs: nn.Module, ours: nn.Module, tokens: Tensor) -> bool:
    segments = torch.tensor([[1] * SPLIT + [2] * (T - SPLIT)]).expand(2, -1)
    parts = [theirs(part[None]).logits for row in tokens for part in row.split([SPLIT, T - SPLIT])]
    alone = torch.cat([torch.cat(parts[:2], dim=1), torch.cat(parts[2:], dim=1)])
    return near(ours(tokens, segments), alone)


@torch.no_grad()
def padded(theirs: nn.Module, ours: nn.Module, tokens: Tensor) -> bool:
    segments = torch.ones_like(tokens)
    segments[0, :PAD] = 0
    actual = ours(tokens, segments)
    return near(actual[:1, PAD:], theirs(tokens[:1, PAD:]).logits) and near(actual[1:], theirs(tokens[1:]).logits)


@torch.no_grad()
def written(theirs: nn.Module, ours: nn.Module, tokens: Tensor) -> bool:
    """Sixteen greedy tokens of a padded batch with a cache; theirs reads the whole text for each."""
    segments = torch.ones_like(tokens)
    segments[0, :PAD] = 0
    actual = generate(ours, tokens, GenerationConfig(temperature=0.0, max_new_tokens=NEW), segment_ids=segments)
    for row, start in ((0, PAD), (1, 0)):
        expected = tokens[row : row + 1, start:]
        for _ in range(NEW):
            expected = torch.cat([expected, theirs(expected).logits[:, -1:].argmax(-1)], dim=1)
        if not torch.equal(actual[row : row + 1, start:], expected):
            return False
    return True


def gradients(theirs: nn.Module, ours: nn.Module, tokens: Tensor) -> bool:
    """Gradients of the loss of two packed documents, our model in training mode."""
    labels = tokens[0, 1:].clone()
    labels[SPLIT - 1] = -100
    segments = torch.tensor([[1] * SPLIT + [2] * (T - SPLIT)])
    F.cross_entropy(ours.train()(tokens[:1], segments)[0, :-1], labels, reduction="sum").backward()
    ours.eval()
    for part in tokens[:1].split([SPLIT, T - SPLIT], dim=1):
        F.cross_entropy(theirs(part).logits[0, :-1], part[0, 1:], reduction="sum").backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    actual = {name: p.grad for name, p in ours.inner.named_parameters()}
    scale = max(float(g.abs().max()) for g in expected.values() if g is not None)
    both = [(actual[name], g) for name, g in expected.items()]
    far = [
        math.inf if (a is None) != (b is None) else 0.0 if a is None else float((a - b).abs().max()) for a, b in both
    ]
    return max(far) <= 1e-3 * scale
