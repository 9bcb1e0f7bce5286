"""One family of transformers against its own eager attention, in all that a run does with a model: native here, or wrapped."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from test_against_transformers import shaken
from tiny_families import tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from genai_pl.config.enums import Head, Shape
from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.generation import generate
from genai_pl.models import load_pretrained, save_pretrained
from genai_pl.models.hf.config import is_supported
from genai_pl.models.hf.transformers_model import WrappedDecoder, load_wrapped
from genai_pl.peft import METHODS
from genai_pl.peft.targets import adapter_layers, module_sites

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


class Outcome(NamedTuple):
    """What a family comes to.

    refused: the line that refuses the whole model, or None. wrong: names of the checks that fail. partly: lines that refuse
    one use of it, by the check. notes: the slower routes that it takes.
    """

    refused: str | None = None
    wrong: tuple[str, ...] = ()
    partly: dict[str, str] = {}
    notes: tuple[str, ...] = ()


def wrapped(theirs: nn.Module, folder: Path) -> Outcome:
    """The outcome under model=hf."""
    theirs.save_pretrained(folder / "theirs")
    try:
        ours = load_wrapped(str(folder / "theirs"))
    except CheckpointError as error:
        raise NotTried(str(error).partition("(")[2][:90]) from None
    except ConfigError as error:
        return Outcome(refused=str(error))
    return compared(ours, folder)._replace(notes=ours.route.notes)


def native(theirs: nn.Module, folder: Path) -> Outcome | None:
    """The outcome as a model of ours, or None where there is no such family of decoders."""
    theirs.save_pretrained(folder / "theirs")
    if not is_supported(folder / "theirs" / "config.json"):
        return None
    try:
        ours = load_pretrained(folder / "theirs")
    except CheckpointError as error:
        return Outcome(refused=str(error))
    if ours.config.shape is not Shape.decoder or ours.config.head is not Head.linear:
        return None
    return compared(ours, folder)


def compared(ours: nn.Module, folder: Path) -> Outcome:
    """The outcome of every check of a loaded model against transformers on the folder's files."""
    # as it is read again: saving and loading alone may change a model (Youtu)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "theirs", attn_implementation="eager").eval()
    tokens = torch.randint(
        3, theirs.get_input_embeddings().weight.shape[0], (2, T), generator=torch.Generator().manual_seed(1)
    )
    checks: dict[str, Callable[..., bool]] = {
        "logits": logits,
        "packed": packed,
        "padded": padded,
        "generation": written,
        "gradients": gradients,
        "export": partial(exported, folder=folder / "ours"),
        "lora": lora,
    }
    wrong, partly = [], {}
    for name, is_equal in checks.items():
        try:
            if not is_equal(theirs, ours, tokens):
                wrong.append(name)
        except ConfigError as error:
            partly[name] = f"refused: {error}"
        except Exception as error:
            wrong.append(f"{name} ({type(error).__name__}: {error})")
    if wrong and not steady(theirs, tokens):  # nothing to hold ours against
        partly |= dict.fromkeys(wrong, "not comparable: transformers' own logits of a text change with what follows it")
        wrong = []
    return Outcome(wrong=tuple(wrong), partly=partly)


def refusal_or_faults(theirs: nn.Module, folder: Path) -> str | list[str]:
    """The line that refuses a wrapped model, or the names of the checks that it fails, [] if none."""
    outcome = wrapped(theirs, folder)
    return list(outcome.wrong) if outcome.refused is None else outcome.refused


def near(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= 1e-3 * expected.abs().max())


@torch.no_grad()
def steady(theirs: nn.Module, tokens: Tensor) -> bool:
    """True if transformers gives the beginning of a text, as it goes on with one, the logits that it has alone."""
    for row in (tokens[:1, PAD:], tokens[:1], tokens[1:]):
        text = row
        for _ in range(NEW):
            text = torch.cat([text, theirs(text).logits[:, -1:].argmax(-1)], dim=1)
        whole = theirs(text).logits
        if not all(near(theirs(text[:, :n]).logits, whole[:, :n]) for n in range(2, text.shape[1])):
            return False
    return True


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
    """Sixteen greedy tokens of a padded batch with a cache; theirs reads the whole text for each, or is `generate`'s."""
    segments = torch.ones_like(tokens)
    segments[0, :PAD] = 0
    actual = generate(ours, tokens, GenerationConfig(temperature=0.0, max_new_tokens=NEW), segment_ids=segments)
    for row, start in ((0, PAD), (1, 0)):
        expected = tokens[row : row + 1, start:]
        for _ in range(NEW):
            expected = torch.cat([expected, theirs(expected).logits[:, -1:].argmax(-1)], dim=1)
        if torch.equal(actual[row : row + 1, start:], expected):
            continue
        # an index of few keys has ties, which a cache may break otherwise than a whole text
        options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
        expected = theirs.generate(tokens[row : row + 1, start:], **options)
        if not torch.equal(actual[row : row + 1, start:], expected):
            return False
    return True


def gradients(theirs: nn.Module, ours: nn.Module, tokens: Tensor) -> bool:
    """Gradients of the loss of two packed documents, our model in training mode; of a native one, those of the embedding."""
    labels = tokens[0, 1:].clone()
    labels[SPLIT - 1] = -100
    segments = torch.tensor([[1] * SPLIT + [2] * (T - SPLIT)])
    F.cross_entropy(ours.train()(tokens[:1], segments)[0, :-1], labels, reduction="sum").backward()
    ours.eval()
    for part in tokens[:1].split([SPLIT, T - SPLIT], dim=1):
        F.cross_entropy(theirs(part, use_cache=False).logits[0, :-1], part[0, 1:], reduction="sum").backward()
    if not isinstance(ours, WrappedDecoder):
        return near(ours.embed.weight.grad, theirs.get_input_embeddings().weight.grad)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    actual = {name: p.grad for name, p in ours.inner.named_parameters()}
    scale = max(float(g.abs().max()) for g in expected.values() if g is not None)
    both = [(actual[name], g) for name, g in expected.items()]
    far = [
        math.inf if (a is None) != (b is None) else 0.0 if a is None else float((a - b).abs().max()) for a, b in both
    ]
    return max(far) <= 1e-3 * scale


@torch.no_grad()
def exported(theirs: nn.Module, ours: nn.Module, tokens: Tensor, *, folder: Path) -> bool:
    """The logits of transformers on the folder that we write."""
    save_pretrained(ours, folder, token_ids={})
    again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return near(again(tokens).logits, theirs(tokens).logits)


def lora(theirs: nn.Module, ours: nn.Module, tokens: Tensor) -> bool:
    """LoRA on all linear layers: it finds some, begins at the base, and its weights get gradients."""
    adapted = METHODS["lora"].make(ours, target_modules="all-linear", rank=2, alpha=4.0)
    n = sum(len(adapter_layers(site.module)) for site in module_sites(adapted))
    actual = adapted(tokens)
    actual.square().mean().backward()
    trained = [p.grad for p in adapted.parameters() if p.requires_grad]
    with torch.no_grad():
        return n > 0 and near(actual, theirs(tokens).logits) and any(g is not None and g.any() for g in trained)
