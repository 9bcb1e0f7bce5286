"""Adapter files in memory: config and tensors between the model and the disk, and checks that both fit together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from genai_pl.config.enums import Head, Shape
from genai_pl.errors import CheckpointError
from genai_pl.models import EncoderDecoder
from genai_pl.peft.adapter import Adapter, AdapterLayer, adapters_of
from genai_pl.peft.io.hf_names import PREFIX, HFModule, lookup
from genai_pl.peft.targets import ModuleSite, adapter_layers

# keys of every adapter_config.json that do not change what is computed
HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type",
    "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform", "modules_to_save", "target_modules",
    "target_parameters",
)  # fmt: skip


@dataclass
class AdapterFile:
    """The content of an adapter folder.

    config: adapter_config.json. tensors: adapter_model.safetensors, by name with `PREFIX`.
    options: our own options of the adapter, or None if PEFT wrote the folder.
    """

    config: dict[str, object]
    tensors: dict[str, Tensor]
    options: dict[str, object] | None = None


class Key(NamedTuple):
    """Address of a tensor: the name of its module in transformers, and the rest of its name ("lora_A.weight")."""

    module: str
    kind: str


class TensorReader:
    """The tensors of a file by module and kind. Each is to be read once: `finish` reports those left over.

    kinds: the rests of names that belong to this format. modules: of the model. filled: parameters set so far, with their values,
    since tied modules share parameters. CheckpointError for a tensor that fits no module.
    """

    def __init__(self, file: AdapterFile, modules: list[HFModule], kinds: tuple[str, ...]) -> None:
        self.names: dict[Key, str] = {}
        self.tensors = file.tensors
        self.filled: dict[nn.Parameter, Tensor] = {}
        # a name is PREFIX, module, kind; a tensor of the base itself is a frequent mistake, with a hint of its own
        for name in file.tensors:
            plain = name.removeprefix(PREFIX)
            kind = next((kind for kind in kinds if plain.endswith(f".{kind}")), None)
            module = lookup(modules, plain.removesuffix(f".{kind}")) if kind else None
            if module is None:
                hint = ": it is the base's own, as PEFT stores those of embeddings; save it with save_embedding_layers=False"
                raise CheckpointError(
                    f"tensor {name} fits no layer of this model{hint if '.base_layer.' in name else ''}"
                )
            self.names[Key(module.name, kind)] = name

    def check_equal(self, names: tuple[str, ...], kind: str) -> None:
        """CheckpointError if modules that are one module here have different tensors of this kind."""
        tensors = [self.peek(name, kind) for name in names if Key(name, kind) in self.names]
        if any(not torch.equal(tensor, tensors[0]) for tensor in tensors):
            raise CheckpointError(f"{' and '.join(names)} differ, and are one layer here")

    def of(self, modules: list[HFModule], kind: str) -> list[HFModule]:
        """The modules that have a tensor of this kind in the file."""
        return [module for module in modules if Key(module.name, kind) in self.names]

    def pop(self, module: str, kind: str) -> Tensor:
        """The tensor, which then counts as read; CheckpointError if it is missing."""
        if Key(module, kind) not in self.names:
            raise CheckpointError(f"tensor {PREFIX}{module}.{kind} is missing")
        return self.tensors[self.names.pop(Key(module, kind))]

    def peek(self, module: str, kind: str) -> Tensor:
        """The tensor, which does not count as read."""
        return self.tensors[self.names[Key(module, kind)]]

    def finish(self) -> None:
        """CheckpointError if tensors were not read."""
        if self.names:
            raise CheckpointError(f"tensor {next(iter(self.names.values()))} fits no layer of this adapter")


@torch.no_grad()
def fill(parameter: Tensor, tensor: Tensor, what: str) -> None:
    """Copy a tensor of a file into a parameter; CheckpointError, naming `what`, if the shapes differ."""
    if parameter.shape != tensor.shape:
        raise CheckpointError(f"{what} has shape {list(tensor.shape)}, this model asks for {list(parameter.shape)}")
    parameter.copy_(tensor)


def make(model: nn.Module, method: Callable[..., nn.Module], options: dict[str, object]) -> Adapter:
    """Apply a PEFT method with options from a file, and return the adapter it added; CheckpointError for unfit options."""
    before = {id(adapter) for adapter in adapters_of(model)}
    try:
        method(model, **options)
    except TypeError as error:
        raise CheckpointError(f"its options cannot be used ({error})") from None
    return next(adapter for adapter in adapters_of(model) if id(adapter) not in before)


def layer_of(site: ModuleSite, adapter: Adapter) -> AdapterLayer | None:
    """The layer of this adapter at a site, or None."""
    return next((layer for layer in adapter_layers(site.module) if layer.adapter is adapter), None)


def common_config(model: nn.Module, peft_type: str) -> dict[str, object]:
    """The keys that every adapter_config.json has: peft_type, task_type and inference_mode."""
    task = "CAUSAL_LM"
    if isinstance(model, EncoderDecoder):
        task = "SEQ_2_SEQ_LM"
    elif model.config.head.scores:
        task = "SEQ_CLS" if model.config.head is Head.score else "TOKEN_CLS"
    elif model.config.shape is Shape.encoder:
        task = "FEATURE_EXTRACTION" if model.config.head is Head.none else None
    return {"peft_type": peft_type, "task_type": task, "inference_mode": True}


def check_neutral(config: dict[str, object], understood: tuple[str, ...]) -> None:
    """CheckpointError for a key that is neither harmless nor in `understood`, unless its value asks for nothing."""
    for key, value in config.items():
        if key not in HARMLESS and key not in understood and value not in (None, False, "none", {}, []):
            raise CheckpointError(f"{key}={value!r} is not supported")
