"""ONNX export: a model as one graph, or two for an encoder-decoder, with dynamic batch size and lengths.

A graph is a function of tensors: a decoder takes the past keys and values and returns the longer ones, under the names of
transformers and Optimum, so that other runtimes can decode with it.
"""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from genai_pl.config.enums import AttentionKind, Shape
from genai_pl.errors import ConfigError
from genai_pl.models.build import Model
from genai_pl.models.hf.config import generation_values, write_config
from genai_pl.models.hf.folder import write_json
from genai_pl.models.onnx.graphs import DecoderGraph, DecoderWithSourceGraph, PlainGraph, SourceGraph

MODEL, ENCODER, DECODER = "model.onnx", "encoder.onnx", "decoder.onnx"
BATCH, LENGTH, PAST, TOTAL, SOURCE = "batch", "length", "past", "total", "source"
# sizes of the example inputs: all differ, and none is 0 or 1, which the exporter would make constants
B, T, P, S = 2, 3, 5, 7


def write_graphs(model: Model, folder: Path) -> list[Path]:
    """Write model.onnx, or encoder.onnx and decoder.onnx, into an existing folder; their paths, or ConfigError."""
    check_exportable(model)
    model = model.eval()
    if model.config.shape is Shape.encoder_decoder:
        graphs = {ENCODER: _source_graph(model), DECODER: _reader_graph(model)}
    else:
        graphs = {MODEL: _decoder_graph(model) if model.config.writes else _plain_graph(model)}
    for name, (graph, inputs, outputs) in graphs.items():
        _write(graph, inputs, outputs, folder / name)
    return [folder / name for name in graphs]


def write_description(
    model: Model, folder: Path, *, token_ids: dict[str, int | None], generation: dict[str, object] | None = None
) -> None:
    """Write config.json and generation_config.json as in a Hugging Face folder of the model.

    token_ids, generation: as in `save_pretrained`.
    """
    values, _, _ = write_config(model.config, token_ids)
    write_json(folder / "config.json", values)
    write_json(folder / "generation_config.json", {**generation_values(values, token_ids), **(generation or {})})


def check_exportable(model: nn.Module) -> None:
    """ConfigError for models that are not exported: of other libraries, approximate attention, virtual tokens."""
    if not isinstance(model, Model):
        raise ConfigError("format=onnx writes our own families; optimum exports this one")
    if model.config.n_experts:
        raise ConfigError("format=onnx writes dense models, not model.n_experts: export with format=hf")
    if model.config.attention_kind is not AttentionKind.full:
        raise ConfigError(
            f"format=onnx writes full attention, not model.attention_kind={model.config.attention_kind.value}"
        )
    parts = (model.encoder, model.decoder) if model.config.shape is Shape.encoder_decoder else (model,)
    if any(part.virtual is not None for part in parts):
        raise ConfigError("format=onnx: prompt and prefix tuning cannot be merged into weights: use another adapter")


Inputs = dict[str, tuple[Tensor | list[Tensor], object]]  # argument -> example, names of its dynamic axes
Graph = tuple[nn.Module, Inputs, list[str]]  # module, inputs, names of outputs


def past_names(n_layer: int) -> list[str]:
    """Names of the inputs for past keys and values, layer by layer."""
    return [f"past_key_values.{n}.{kind}" for n in range(n_layer) for kind in ("key", "value")]


def present_names(n_layer: int) -> list[str]:
    """Names of the outputs for past and new keys and values."""
    return [f"present.{n}.{kind}" for n in range(n_layer) for kind in ("key", "value")]


def source_names(n_layer: int) -> list[str]:
    """Names of the keys and values of a source, outputs of the encoder and inputs of the decoder."""
    return [f"source.{n}.{kind}" for n in range(n_layer) for kind in ("key", "value")]


def _decoder_graph(model: nn.Module) -> Graph:
    n = model.config.n_layer
    inputs = {**_text(P + T, TOTAL), "past": _example_cache(model, n, P, PAST)}
    return DecoderGraph(model), inputs, ["logits", *present_names(n)]


def _source_graph(model: nn.Module) -> Graph:
    return SourceGraph(model), _text(T, LENGTH), ["last_hidden_state", *source_names(model.config.n_decoder_layer)]


def _reader_graph(model: nn.Module) -> Graph:
    n = model.config.n_decoder_layer
    inputs = {
        **_text(P + T, TOTAL),
        "encoder_attention_mask": (_ones(S), {0: BATCH, 1: SOURCE}),
        "past": _example_cache(model, n, P, PAST),
        "source": _example_cache(model, n, S, SOURCE),
    }
    return DecoderWithSourceGraph(model), inputs, ["logits", *present_names(n)]


def _plain_graph(model: nn.Module) -> Graph:
    inputs = _text(T, LENGTH)
    if model.types is not None:
        inputs["token_type_ids"] = (torch.zeros_like(_ones(T)), {0: BATCH, 1: LENGTH})
    if model.score is not None:
        return PlainGraph(model), inputs, ["logits"]
    return PlainGraph(model), inputs, [*(["logits"] if model.lm_head is not None else []), "last_hidden_state"]


def _text(n_seen: int, axis: str) -> Inputs:
    """Example tokens (B, T) and a mask (B, n_seen) whose length is the dynamic `axis`."""
    return {
        "input_ids": (torch.zeros_like(_ones(T)), {0: BATCH, 1: LENGTH}),
        "attention_mask": (_ones(n_seen), {0: BATCH, 1: axis}),
    }


def _example_cache(model: nn.Module, n_layer: int, length: int, axis: str) -> tuple[list[Tensor], object]:
    """Example keys and values (B, K, length, D) of all layers, with their axes."""
    size = (B, model.config.n_kv_head, length, model.config.head_dim)
    dtype = model.embed.weight.dtype
    return [torch.zeros(size, dtype=dtype) for _ in range(2 * n_layer)], [{0: BATCH, 2: axis}] * (2 * n_layer)


def _ones(length: int) -> Tensor:
    return torch.ones(B, length, dtype=torch.long)


def _names(inputs: Inputs) -> list[str]:
    """The name of each input tensor, lists written out."""
    names = {"past": past_names, "source": source_names}
    return [
        name for key, (given, _) in inputs.items() for name in (names[key](len(given) // 2) if key in names else [key])
    ]


def _write(graph: nn.Module, inputs: Inputs, outputs: Sequence[str], path: Path) -> None:
    """Trace a graph with its example inputs and write it; weights above 2 GB go into a file beside it."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own, about torch
        program = torch.onnx.export(
            graph,
            kwargs={key: given for key, (given, _) in inputs.items()},
            input_names=_names(inputs),
            output_names=list(outputs),
            dynamic_shapes={key: axes for key, (_, axes) in inputs.items()},
            dynamo=True,
            verbose=False,
        )
    program.save(str(path))
