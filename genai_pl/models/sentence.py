"""Sentence heads: the modules of a sentence-transformers folder that turn hidden states of a text into its vector.

A folder lists its modules in modules.json: the Transformer, a pooling, and any of Dense, LayerNorm, Normalize and Dropout
after it, each with a config.json and weights of its own. They are read and written as they are, so that the same folder
gives the same vectors here and in sentence-transformers.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genai_pl.errors import CheckpointError
from genai_pl.models.hf.folder import WEIGHTS, read_json
from genai_pl.models.pooling import pool
from genai_pl.models.sentence_files import FLAGS, MODULES, NAMES, POOLING, TOKENS, check_transformer, modules, poolings

ACTIVATIONS = ("Tanh", "Identity", "ReLU", "GELU", "SiLU", "Sigmoid", "Mish", "ELU", "LeakyReLU", "Softplus")
Files = Mapping[str, object]  # the content of JSON files by their path in the folder


class Dense(nn.Module):
    """act(linear(x)) over the last dimension, plus the input where `use_residual` is set.

    settings: the module's config.json. name: the file's path, for errors. CheckpointError for other activations and for
    modules that read or write anything but the text's vector.
    """

    def __init__(self, settings: dict, name: str) -> None:
        super().__init__()
        # what is supported
        *_, kind = str(settings.get("activation_function", "torch.nn.Tanh")).split(".")
        known = str(settings.get("activation_function", "torch.")).startswith("torch.") and kind in ACTIVATIONS
        sizes = settings.get("in_features"), settings.get("out_features")
        inputs = {settings.get(f"module_{end}put_name") or NAMES[0] for end in ("in", "out")}
        if not known or inputs != {NAMES[0]} or not all(isinstance(n, int) and n > 0 for n in sizes):
            raise CheckpointError(f"{name}: this Dense module is not supported ({settings})")
        # the layers, under the names of the file's tensors
        self.linear = nn.Linear(*sizes, bias=settings.get("bias", True))
        self.activation = getattr(nn, kind)()
        self.has_residual = bool(settings.get("use_residual"))
        self.residual = nn.Linear(*sizes, bias=False) if self.has_residual and sizes[0] != sizes[1] else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.linear(x))
        return y + self.residual(x) if self.has_residual else y


class LayerNorm(nn.Module):
    """Layer normalization of the text's vector; settings: the module's config.json."""

    def __init__(self, settings: dict, name: str) -> None:
        super().__init__()
        if not isinstance(settings.get("dimension"), int):
            raise CheckpointError(f"{name}: this LayerNorm module is not supported ({settings})")
        self.norm = nn.LayerNorm(settings["dimension"])

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Normalize(nn.Module):
    """The text's vector divided by its length, so that dot products are cosines."""

    def __init__(self, settings: dict, name: str) -> None:
        super().__init__()
        if {settings.get(f"module_{end}put_name") or NAMES[0] for end in ("in", "out")} != {NAMES[0]}:
            raise CheckpointError(f"{name}: this Normalize module is not supported ({settings})")

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


def _dropout(settings: dict, name: str) -> nn.Module:
    """The module Dropout, with the signature of the classes above."""
    return nn.Dropout(float(settings.get("dropout", 0.2)))


LAYERS = {"Dense": Dense, "LayerNorm": LayerNorm, "Normalize": Normalize, "Dropout": _dropout}


class SentenceHead(nn.Module):
    """Vectors (B, D) from the hidden states (B, T, C) of texts padded on the right, and how a text becomes tokens.

    files: the content of modules.json and of the JSON files that it names, by path. n_embd: C. where: the folder, for
    errors. closes: whether a text gets an end token, where the tokenizer gives it none.

    A caller reads `size` (D), `prompt` (text before each text), `max_length` (tokens, or None), `lower_case` and `pooling`.
    """

    def __init__(self, files: Files, *, n_embd: int, where: str, closes: bool = False) -> None:
        super().__init__()
        self.files, self.n_embd, self.where, self.closes = dict(files), n_embd, where, closes
        # the three kinds of settings: of tokens, of the pooling, of the modules after it
        (_, _, tokens), (_, pooling_path, pooling_config), *rest = modules(files, where)
        check_transformer(tokens, where)
        self.poolings = poolings(pooling_config, f"{where}/{pooling_path}/config.json")
        self.max_length: int | None = tokens.get("max_seq_length")
        self.lower_case = bool(tokens.get("do_lower_case"))
        self.prompt, self.truncate_dim = self._prompt(pooling_config)
        self.paths = [path for _, path, _ in rest]
        self.layers = nn.ModuleList(LAYERS[kind](given, f"{where}/{path}/config.json") for kind, path, given in rest)
        self._check_sizes()

    def _prompt(self, pooling_config: dict) -> tuple[str, int | None]:
        """The default prompt and the length of truncated vectors; CheckpointError for a prompt that pooling leaves out."""
        settings = self.files.get("config_sentence_transformers.json") or {}
        name, prompts = settings.get("default_prompt_name"), settings.get("prompts") or {}
        if name is not None and name not in prompts:
            raise CheckpointError(
                f"{self.where}/config_sentence_transformers.json: default_prompt_name={name} is none of its prompts"
            )
        prompt = "" if name is None else prompts[name] or ""
        if prompt and not pooling_config.get("include_prompt", True):
            raise CheckpointError(
                f"{self.where}/{POOLING}: include_prompt=false is not supported with a default prompt"
            )
        return prompt, settings.get("truncate_dim")

    def _check_sizes(self) -> None:
        """Set `size`; CheckpointError where a module takes another number of channels than the one before it gives."""
        size = self.n_embd * len(self.poolings)
        for path, layer in zip(self.paths, self.layers, strict=True):
            input_sizes = {Dense: lambda x: x.linear.in_features, LayerNorm: lambda x: x.norm.normalized_shape[0]}
            expected = input_sizes.get(type(layer), lambda _, size=size: size)(layer)
            if expected != size:
                raise CheckpointError(f"{self.where}/{path}: it takes {expected} numbers, and is given {size}")
            size = layer.linear.out_features if isinstance(layer, Dense) else size
        self.size = min(size, self.truncate_dim or size)

    @property
    def pooling(self) -> str:
        """The name of the pooling; several, whose vectors are concatenated, are joined by +."""
        return "+".join(self.poolings)

    def forward(self, hidden: Tensor, segment_ids: Tensor) -> Tensor:
        vectors = torch.cat([pool(hidden, segment_ids, kind) for kind in self.poolings], dim=-1)
        for layer in self.layers:
            vectors = layer(vectors)
        return vectors[..., : self.size]

    def with_pooling(self, kind: str) -> "SentenceHead":
        """A head with another pooling; CheckpointError where the modules after it take another number of channels."""
        if self.poolings == (kind,):
            return self
        config_file = f"{self.files[MODULES][1]['path']}/config.json"
        return self.with_settings(config_file, pooling_settings(kind, self.n_embd))

    def with_settings(self, config_file: str, settings: dict) -> "SentenceHead":
        """A head with the same weights and one of its files exchanged."""
        options = {"n_embd": self.n_embd, "where": self.where, "closes": self.closes}
        head = SentenceHead({**self.files, config_file: settings}, **options)
        head.load_state_dict(self.state_dict())
        head.max_length = self.max_length
        return head

    def tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Path of the safetensors file and weights, for each module that has weights."""
        for path, layer in zip(self.paths, self.layers, strict=True):
            if weights := {name: x.detach().cpu().contiguous() for name, x in layer.state_dict().items()}:
                yield f"{path}/{WEIGHTS}", weights


def default_head(pooling: str, *, n_embd: int, max_length: int | None, closes: bool) -> SentenceHead:
    """The head of a model without sentence-transformers files: a pooling and a division by the length.

    max_length: tokens that a text is truncated to, written into the folder; None: the model's own limit. closes: as in
    `SentenceHead`.
    """
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    listing = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(kinds)
    ]
    files = {
        MODULES: listing,
        TOKENS[0]: {"max_seq_length": max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
        POOLING: pooling_settings(pooling, n_embd),
    }
    return SentenceHead(files, n_embd=n_embd, where="sentence-transformers", closes=closes)


def pooling_settings(kind: str, n_embd: int) -> dict[str, object]:
    """The content of 1_Pooling/config.json, as every version of sentence-transformers reads it."""
    return {"word_embedding_dimension": n_embd, **{flag: pooling == kind for flag, pooling in FLAGS.items()}}


def read_head(folder: Path, *, n_embd: int) -> SentenceHead | None:
    """The head that a folder describes, with its weights, in evaluation mode; None where the folder has no modules.json."""
    if not (folder / MODULES).is_file():
        return None
    try:
        listing = json.loads((folder / MODULES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / MODULES}: not readable as JSON ({error})") from None
    config_files = [
        f"{entry['path']}/config.json" for entry in listing if isinstance(entry, dict) and entry.get("path")
    ]
    # only files that modules.json or sentence-transformers itself names are read
    names = ["config_sentence_transformers.json", *TOKENS, *config_files]
    files = {name: read_json(folder / name) for name in names if (folder / name).is_file()}
    head = SentenceHead({MODULES: listing, **files}, n_embd=n_embd, where=str(folder))
    for path, layer in zip(head.paths, head.layers, strict=True):
        if layer.state_dict():
            _load(layer, folder / path)
    return head.eval()


def _load(layer: nn.Module, folder: Path) -> None:
    """Read a module's weights, from safetensors or an older file of torch without code in it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    older = folder / "pytorch_model.bin"
    try:
        if (folder / WEIGHTS).is_file() or not older.is_file():
            layer.load_state_dict(load_file(folder / WEIGHTS))
        else:
            layer.load_state_dict(torch.load(older, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises whatever its unpickler meets in a broken file
        if not isinstance(error, SafetensorError | OSError | RuntimeError | ValueError | EOFError | KeyError):
            raise
        raise CheckpointError(f"{folder}: its weights cannot be read ({str(error).splitlines()[0]})") from None
