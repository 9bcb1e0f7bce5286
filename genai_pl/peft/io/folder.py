"""Adapter folders: adapter_config.json and adapter_model.safetensors in PEFT's layout; data only, never code.

Each format has a writer and a reader. PEFT's options cannot express all of genai_pl's, so the metadata of the safetensors file
holds those too; a folder that PEFT wrote has none, and its options are inferred from its config and tensors.
"""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from genai_pl.atomic_io import ADAPTER, write_atomic
from genai_pl.config.enums import Head, Position
from genai_pl.config.labels import read_labels
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models import WrappedDecoder
from genai_pl.models.hf.folder import read_json, write_json
from genai_pl.peft.adapter import Adapter, AdapterLayer, adapters_of
from genai_pl.peft.bitfit import bitfit
from genai_pl.peft.bottleneck import bottleneck
from genai_pl.peft.ia3 import ia3
from genai_pl.peft.io.ia3 import read_ia3, write_ia3
from genai_pl.peft.io.lora import read_lora, write_lora
from genai_pl.peft.io.native import read_own, write_own
from genai_pl.peft.io.tensors import AdapterFile
from genai_pl.peft.lora import lora
from genai_pl.peft.prefix import prefix, read_prefix, write_prefix
from genai_pl.peft.prompt import prompt, read_prompt, write_prompt
from genai_pl.plugins import ADVICE

log = logging.getLogger(__name__)

XLNET_PARAMETERS = ("q_proj", "k_proj", "v_proj", "o_proj")  # bare parameters in transformers, while PEFT wraps layers
WEIGHTS = "adapter_model.safetensors"
LABELS = "labels.json"  # names of the head's outputs, in the keys of transformers' config.json
OPTIONS = "genai_pl"  # key of the metadata with our options


class Format(NamedTuple):
    """The two directions of a file format.

    write: (model, adapter) -> AdapterFile. read: (model, AdapterFile) -> the model with the adapter.
    """

    write: Callable[[nn.Module, Adapter], AdapterFile]
    read: Callable[[nn.Module, AdapterFile], nn.Module]


class Method(NamedTuple):
    """A PEFT method. make: function from a model to the model with an adapter. kind: key of `FORMATS` of its files."""

    make: Callable[..., nn.Module]
    kind: str


FORMATS = {  # by peft_type in adapter_config.json
    "LORA": Format(write_lora, read_lora),
    "IA3": Format(write_ia3, read_ia3),
    "BOTTLENECK": Format(write_own, partial(read_own, method=bottleneck)),
    "BITFIT": Format(write_own, partial(read_own, method=bitfit)),
    "PROMPT_TUNING": Format(write_prompt, read_prompt),
    "PREFIX_TUNING": Format(write_prefix, read_prefix),
}
METHODS = {  # by Adapter.method, as checkpoints store it
    "lora": Method(lora, "LORA"),
    "dora": Method(lora, "LORA"),
    "ia3": Method(ia3, "IA3"),
    "bottleneck": Method(bottleneck, "BOTTLENECK"),
    "bitfit": Method(bitfit, "BITFIT"),
    "prompt": Method(prompt, "PROMPT_TUNING"),
    "prefix": Method(prefix, "PREFIX_TUNING"),
}


def save_adapter(model: nn.Module, folder: Path, *, base: str, adapter: Adapter | None = None) -> None:
    """Write an adapter so that PEFT and `load_adapter` can read it; each file is replaced atomically.

    base: folder or hub id of the model without adapters, recorded in the config.
    adapter: the one to write; None for the one that is trained, or the only one.
    """
    from safetensors.torch import save_file

    adapter = _trained_adapter(model) if adapter is None else adapter
    file = FORMATS[METHODS[adapter.method].kind].write(model, adapter)
    # warn about the one case that PEFT reads in part only
    attention = sorted({name for name in file.config.get("target_modules") or () if name in XLNET_PARAMETERS})
    if attention and getattr(model.config, "position", None) is Position.xl:
        log.warning(
            "adapter     PEFT finds no %s in transformers' XLNet, whose attention has bare parameters: genai_pl alone reads "
            "this adapter whole (peft.target_modules=[up_proj,down_proj] suits both)",
            ", ".join(attention),
        )
    # weights first: a folder counts as an adapter once it has the config
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in file.tensors.items()}
    metadata = {"format": "pt", OPTIONS: json.dumps(file.options)}
    config = {**file.config, "base_model_name_or_path": base}
    write_atomic(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata=metadata))
    if model.config.head.scores and "id2label" in model.config.extra:
        labels = read_labels(model.config.extra, model.config.n_labels).values()
        write_atomic(folder / LABELS, lambda path: write_json(path, labels))
    write_atomic(folder / ADAPTER, lambda path: write_json(path, config))


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the adapter of a folder, PEFT's or of genai_pl; CheckpointError names the folder and the reason."""
    try:
        config = read_json(folder / ADAPTER)
        kind = str(config.get("peft_type"))
        if kind not in FORMATS:
            raise CheckpointError(f"peft_type={kind} is not supported; supported: {', '.join(FORMATS)}{ADVICE}")
        file = _read_file(folder / WEIGHTS, config)
        return FORMATS[kind].read(model, file)
    except (CheckpointError, ConfigError) as error:
        message = str(error)
        raise CheckpointError(message if message.startswith(str(folder)) else f"{folder}: {message}") from None


def read_method(folder: Path) -> tuple[str, dict[str, object]]:
    """(peft_type, our options, empty for a file of PEFT's) of an adapter folder, without its model; CheckpointError as above."""
    try:
        config = read_json(folder / ADAPTER)
        options = _read_file(folder / WEIGHTS, config).options
        return str(config.get("peft_type")), options if isinstance(options, dict) else {}
    except CheckpointError as error:
        message = str(error)
        raise CheckpointError(message if message.startswith(str(folder)) else f"{folder}: {message}") from None


def add_label_head(model: nn.Module, folder: Path) -> None:
    """Give a base the head for labels whose weights an adapter folder brings, if it brings one.

    The names are those of labels.json; without it the shape of the weight says how many there are, and one output is a reward.
    The global generator is not advanced.
    """
    heads = {"SEQ_CLS": Head.score, "TOKEN_CLS": Head.tokens}
    head = heads.get(read_json(folder / ADAPTER).get("task_type"))
    if head is None or isinstance(model, WrappedDecoder):
        return
    values = read_json(folder / LABELS) if (folder / LABELS).is_file() else {}
    n = len(values.get("id2label") or ()) or _n_outputs(folder / WEIGHTS)
    if not values and model.config.head is head and model.config.n_labels == n:
        return
    labels = read_labels(values, n) if values or n > 1 else None
    with torch.random.fork_rng(devices=[]):
        model.set_head(head, labels)


def _n_outputs(path: Path) -> int:
    """The outputs of the head in a file of weights; 1 for a file without one, which is refused when it is read."""
    tensors = _read_file(path, {}).tensors
    ends = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
    return next((len(tensor) for name, tensor in tensors.items() if name.endswith(ends)), 1)


def _trained_adapter(model: nn.Module) -> Adapter:
    """The adapter with trainable parameters, else the only one; ConfigError if that leaves a choice."""
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    trained = [layer.adapter for layer in layers if any(_is_trained(name, p) for name, p in layer.named_parameters())]
    candidates = {id(adapter): adapter for adapter in trained} or {id(a): a for a in adapters_of(model)}
    if len(candidates) != 1:
        raise ConfigError(f"the model has {len(candidates)} adapters to choose from: name the one to write")
    return next(iter(candidates.values()))


def _is_trained(name: str, parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and not name.startswith("base.")


def _read_file(path: Path, config: dict[str, object]) -> AdapterFile:
    """The tensors and our options, beside the config; CheckpointError for a missing or damaged file, or a number not finite."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise CheckpointError(f"no {path.name} in it (other formats: let PEFT save it again)")
    try:
        with safe_open(path, "pt") as reader:
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
            options = json.loads((reader.metadata() or {}).get(OPTIONS, "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read ({error})") from None
    # a run that diverged, or 16 bits that overflowed: every answer would fail, or be noise
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise CheckpointError(f"{path.name} has numbers that are not finite, in {name}: train the adapter again")
    return AdapterFile(config, tensors, options)
