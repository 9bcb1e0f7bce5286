"""GGUF folders: model.gguf for llama.cpp, and a Modelfile with which Ollama makes a model of it; adapter.gguf, a LoRA alone."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from genai_pl.atomic_io import write_atomic
from genai_pl.data.gguf_tokenizer import tokenizer_metadata
from genai_pl.errors import ConfigError
from genai_pl.loading import Loaded
from genai_pl.models import WrappedDecoder
from genai_pl.models.gguf.architectures import architecture_of
from genai_pl.models.gguf.metadata import context_length
from genai_pl.models.gguf.package import check_type, gguf_package
from genai_pl.models.gguf.writer import write_gguf, write_lora_gguf
from genai_pl.peft.io.gguf import gguf_factors
from genai_pl.references import GGUF_MODEL

STORED = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
ADAPTER_FILE = "adapter.gguf"
USUAL_CONTEXT = 4096  # tokens that Ollama reads at most, unless the user says otherwise
SAMPLING = {  # generation_config.json -> Ollama's parameters
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
USUAL = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # transformers' where it samples and the file is silent


def check_gguf_options(quantize: str | None) -> None:
    """ConfigError for a type of numbers that is not written, or without the package gguf; before anything is loaded."""
    gguf_package("format=gguf")
    if quantize is not None:
        check_type(quantize)


def write_gguf_folder(model: nn.Module, loaded: Loaded, out: Path, *, quantize: str | None, name: str) -> str:
    """Write model.gguf and a Modelfile; returns the names of what reads them.

    quantize: type of the matrices; None: that of the model's embedding. name: what the model calls itself.
    """
    if isinstance(model, WrappedDecoder):
        kind = model.config.values["model_type"]
        raise ConfigError(
            f"format=gguf: transformers runs this model ({kind}): export format=hf, then llama.cpp's convert_hf_to_gguf.py"
        )
    # all that can be refused, before anything is written
    architecture = architecture_of(model.config)
    tokenizer, size = loaded.tokenizer, model.config.vocab_size
    tokens = tokenizer_metadata(tokenizer, vocab_size=size, end_ids=model.config.eos_token_ids)
    quantize = quantize or STORED[model.embed.weight.dtype]
    notes = list(tokens.notes)
    context = context_length(model.config, architecture)
    if context < model.config.max_seq_len:
        notes.append(f"llama.cpp's {architecture.name} has no windows: context_length is the window, {context} tokens")
    if not model.config.rope_scaling.truncate:
        notes.append("llama.cpp rounds the ends of YaRN's ramp to whole channels, this model does not (truncate=false)")

    def write(folder: Path) -> None:
        folder.mkdir()
        coarse = write_gguf(
            model, architecture, folder / GGUF_MODEL, tokenizer=tokens.keys, quantize=quantize, name=name
        )
        if coarse:
            shown = ", ".join(coarse[:3]) + (", ..." if len(coarse) > 3 else "")
            notes.append(f"{len(coarse)} matrices are in f16, as their rows are no multiple of 32: {shown}")
        ends = [tokenizer.convert_ids_to_tokens(i) for i in model.config.eos_token_ids]
        text = modelfile(loaded.defaults.generation, ends=ends, context=context)
        (folder / "Modelfile").write_text(text, encoding="utf-8")

    write_atomic(out, write)
    for note in notes:
        print(f"note        {note}")
    return f"llama.cpp, Ollama (ollama create NAME -f {out}/Modelfile), generate.py and serve.py"


def write_gguf_adapter(model: nn.Module, out: Path, *, name: str) -> str:
    """Write adapter.gguf, the LoRA of a model without its base; returns the names of what reads it."""
    if isinstance(model, WrappedDecoder):
        raise ConfigError(
            "format=gguf_lora: transformers runs this model: export format=peft, then convert_lora_to_gguf.py"
        )
    architecture = architecture_of(model.config)
    factors = gguf_factors(model, architecture.table(model.config))

    def write(folder: Path) -> None:
        folder.mkdir()
        write_lora_gguf(factors, architecture, folder / ADAPTER_FILE, name=name)

    write_atomic(out, write)
    return f"llama.cpp (llama-server -m BASE.gguf --lora {out}/{ADAPTER_FILE}), Ollama (ADAPTER in a Modelfile)"


def modelfile(generation: Mapping[str, object], *, ends: list[str], context: int) -> str:
    """Ollama's Modelfile: the chat template stays in the file, sampling and end tokens are parameters.

    generation: values of generation_config.json. ends: tokens that end a text. context: tokens that the model reads.

    >>> print(modelfile({"temperature": 0.6, "do_sample": True}, ends=["<|im_end|>"], context=2048), end="")
    FROM ./model.gguf
    PARAMETER num_ctx 2048
    PARAMETER temperature 0.6
    PARAMETER top_k 50
    PARAMETER top_p 1.0
    PARAMETER stop "<|im_end|>"
    """
    lines = [f"FROM ./{GGUF_MODEL}", f"PARAMETER num_ctx {min(context, USUAL_CONTEXT)}"]
    values = {**USUAL, **generation} if generation.get("do_sample") else {**generation}
    if generation.get("do_sample") is False:
        values = {"temperature": 0}
    for key, parameter in SAMPLING.items():
        if values.get(key) is not None:
            lines.append(f"PARAMETER {parameter} {values[key]}")
    for end in ends:
        quoted = end.replace("\\", "\\\\").replace('"', '\\"')
        lines.append(f'PARAMETER stop "{quoted}"')
    return "\n".join(lines) + "\n"
