"""A model as ONNX graphs with batches and lengths of any size, and the same with weights in 8 bits."""

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
# sizes of the example: all differ, and none is 0 or 1, which the exporter would take for constants
B, T, P, S = 2, 3, 5, 7


def write_graphs(model: Model, folder: Path) -> list[Path]:
    """Write model.onnx, or encoder.onnx and decoder.onnx, into an existing folder; returns their paths."""
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
    """Write the config.json and generation_config.json that a Hugging Face folder of the model has."""
    values, _, _ = write_config(model.config, token_ids)
    write_json(folder / "config.json", values)
    write_json(folder / "generation_config.json", {**generation_values(values, token_ids), **(generation or {})})


def check_exportable(model: nn.Module) -> None:
    """ConfigError for what has no graph."""
    if not isinstance(model, Model):
        raise ConfigError("format=onnx writes our own families; optimum exports this one")
    if model.config.attention_kind is not AttentionKind.full:
        raise ConfigError(
            f"format=onnx writes full attention, not model.attention_kind={model.config.attention_kind.value}"
        )
    parts = (model.encoder, model.decoder) if model.config.shape is Shape.encoder_decoder else (model,)
    if any(part.virtual is not None for part in parts):
        raise ConfigError("format=onnx: prompt and prefix tuning cannot be merged into weights: use another adapter")


Inputs = dict[str, tuple[Tensor | list[Tensor], object]]  # by argument: an example, and the names of its axes
Graph = tuple[nn.Module, Inputs, list[str]]


def past_names(n_layer: int) -> list[str]:
    """What the graph calls the keys and values that it takes."""
    return [f"past_key_values.{n}.{kind}" for n in range(n_layer) for kind in ("key", "value")]


def present_names(n_layer: int) -> list[str]:
    """What it calls those that it gives."""
    return [f"present.{n}.{kind}" for n in range(n_layer) for kind in ("key", "value")]


def source_names(n_layer: int) -> list[str]:
    """What the keys and values of an encoder's text are called."""
    return [f"source.{n}.{kind}" for n in range(n_layer) for kind in ("key", "value")]


def _decoder_graph(model: nn.Module) -> Graph:
    n = model.config.n_layer
    inputs = {**_text(P + T, TOTAL), "past": _held(model, n, P, PAST)}
    return DecoderGraph(model), inputs, ["logits", *present_names(n)]


def _source_graph(model: nn.Module) -> Graph:
    return SourceGraph(model), _text(T, LENGTH), ["last_hidden_state", *source_names(model.config.n_decoder_layer)]


def _reader_graph(model: nn.Module) -> Graph:
    n = model.config.n_decoder_layer
    inputs = {
        **_text(P + T, TOTAL),
        "encoder_attention_mask": (_ones(S), {0: BATCH, 1: SOURCE}),
        "past": _held(model, n, P, PAST),
        "source": _held(model, n, S, SOURCE),
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
    return {
        "input_ids": (torch.zeros_like(_ones(T)), {0: BATCH, 1: LENGTH}),
        "attention_mask": (_ones(n_seen), {0: BATCH, 1: axis}),
    }


def _held(model: nn.Module, n_layer: int, length: int, axis: str) -> tuple[list[Tensor], object]:
    size = (B, model.config.n_kv_head, length, model.config.head_dim)
    dtype = model.embed.weight.dtype
    return [torch.zeros(size, dtype=dtype) for _ in range(2 * n_layer)], [{0: BATCH, 2: axis}] * (2 * n_layer)


def _ones(length: int) -> Tensor:
    return torch.ones(B, length, dtype=torch.long)


def _names(inputs: Inputs) -> list[str]:
    """One name for each tensor."""
    names = {"past": past_names, "source": source_names}
    return [
        name for key, (given, _) in inputs.items() for name in (names[key](len(given) // 2) if key in names else [key])
    ]


def _write(graph: nn.Module, inputs: Inputs, outputs: Sequence[str], path: Path) -> None:
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
