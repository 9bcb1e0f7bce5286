"""Export folders: a trained model with its tokenizer and model card, for transformers, PEFT and vLLM."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from genai_pl.atomic_io import write_atomic
from genai_pl.config.enums import Head, Shape
from genai_pl.data.generation_defaults import NO_DEFAULTS, GenerationDefaults, generation_config_values
from genai_pl.data.tokenizer import reloads_unchanged, save_tokenizer
from genai_pl.errors import CheckpointError
from genai_pl.models import Model, WrappedDecoder, n_parameters, save_pretrained
from genai_pl.models.hf.config import NATIVE, write_config
from genai_pl.progress import written_bytes_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS = {
    (Shape.decoder, True): "text-generation",
    (Shape.encoder, True): "fill-mask",
    (Shape.encoder_decoder, True): "text2text-generation",
    (Shape.decoder, False): "feature-extraction",
    (Shape.encoder, False): "feature-extraction",
}


def export_model(
    model: Model,
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    *,
    card: dict[str, str],
    defaults: GenerationDefaults = NO_DEFAULTS,
    files: dict[str, object] | None = None,
) -> str:
    """Write the folder, completely or not at all; returns the name of the class that reads it.

    card: {heading: paragraph} of the model card. defaults: generation defaults of the folder that the model came from.
    files: further files for `write_files`.
    """
    reader = []

    def write(temporary: Path) -> None:
        ids = token_ids(tokenizer)
        generation = generation_config_values(model.config, ids, defaults)
        options = {"token_ids": ids | dict(defaults.config), "generation": generation}
        with written_bytes_bar(temporary, n_bytes(model), "writing"):
            reader.append(save_pretrained(model, temporary, **options))
        save_tokenizer(tokenizer, temporary)
        write_files(temporary, files or {})
        (temporary / "README.md").write_text(_model_card(model, reader[0], card), encoding="utf-8")

    # written to a temporary folder that is renamed once all of it is on disk
    write_atomic(folder, write)
    return reader[0]


@contextmanager
def read_alike(model: Model | WrappedDecoder, tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """Context manager: inside, the model may be saved so that AutoTokenizer loads the same tokenizer from the folder.

    Beside a config.json of type qwen2, AutoTokenizer builds a pre-tokenizer of its own, whatever tokenizer.json says. If that
    differs, output biases of zero are added inside, which change nothing but make the model a llama. CheckpointError for types
    without such a way out.
    """
    # most models need no change
    kind = _model_type(model)
    if reloads_unchanged(tokenizer, kind):
        yield
        return
    if isinstance(model, WrappedDecoder) or kind != "qwen2":
        raise CheckpointError(f"AutoTokenizer reads another tokenizer than this one beside a model of type {kind}")
    # output biases of zero for the time of saving, so that the model is written as a llama
    before, layers = model.config, [block.attention.o_proj for block in model.blocks]
    for layer in layers:
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features), requires_grad=False)
    model.config = replace(before, o_bias=True)
    try:
        yield
    finally:
        model.config = before
        for layer in layers:
            layer.bias = None


def _model_type(model: Model | WrappedDecoder) -> str:
    """model_type as config.json will have it."""
    values = model.config.values if isinstance(model, WrappedDecoder) else write_config(model.config, {})[0]
    return str(values["model_type"])


def write_files(folder: Path, files: Mapping[str, object]) -> None:
    """Write files into a folder by relative path: tensors for a .safetensors file, JSON for all others."""
    from safetensors.torch import save_file

    for name, values in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".safetensors"):
            save_file(values, folder / name, metadata={"format": "pt"})
        else:
            (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def n_bytes(model: nn.Module) -> int:
    """Bytes of all weights of a model, shared ones once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def token_ids(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int | None]:
    """bos_token_id, eos_token_id and pad_token_id, None where the tokenizer has no such token."""
    return {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}


def adapter_card(base: str, card: dict[str, str]) -> str:
    """The README.md of an adapter folder, with the metadata that the hub reads. base: reference of the base model."""
    lines = ["---", f"base_model: {base}", "library_name: peft", "---", "", "# Adapter", ""]
    for heading, paragraph in card.items():
        lines += [f"## {heading}", "", paragraph, ""]
    return "\n".join(lines)


def _model_card(model: Model, reader: str, card: dict[str, str]) -> str:
    """The README.md of a model folder. reader: name of the class that reads it."""
    labels = {Head.score: "text-classification", Head.tokens: "token-classification"}
    task = labels.get(model.config.head) or TASKS[model.config.shape, model.config.head is not Head.none]
    library = NATIVE if reader == NATIVE else "transformers"
    lines = ["---", f"library_name: {library}", f"pipeline_tag: {task}", "---", "", "# Language model", ""]
    lines += [f"{n_parameters(model):,} parameters, read by `{reader}`.", ""]
    for heading, paragraph in card.items():
        lines += [f"## {heading}", "", paragraph, ""]
    return "\n".join(lines)
