"""The export command: a trained model in, a folder for transformers, PEFT, ONNX Runtime or llama.cpp out.

Formats: `hf` (the model as it is), `merged` (adapters added into the weights), `peft` (a copy of the adapter),
`onnx` (graphs of prefill and step, optionally with int8 weights), `gguf` (one file for llama.cpp and Ollama, in any of its
types of numbers; adapters are added into the weights), `gguf_lora` (a LoRA alone, for llama.cpp to add to its base). The
folder is written atomically: it is complete, or absent. An existing folder is never overwritten, because it may be what a
server is reading.
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import nn

from genai_pl.atomic_io import ADAPTER, write_atomic
from genai_pl.callbacks import newest_checkpoints, step_of
from genai_pl.checkpoints.average import mean_weights
from genai_pl.cli.export_gguf import check_gguf_options, write_gguf_adapter, write_gguf_folder
from genai_pl.data.generation_defaults import generation_config_values
from genai_pl.data.tokenizer import save_tokenizer
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.evaluation.embeddings import saved_sentence_head
from genai_pl.exporting import export_model, read_alike, token_ids
from genai_pl.loading import Loaded, load, resolve, resolve_adapter, stored_dtypes
from genai_pl.models.gguf.package import WRITABLE
from genai_pl.models.onnx.export import write_description, write_graphs
from genai_pl.models.onnx.quantize import quantize_graph
from genai_pl.peft import adapters_of, merge
from genai_pl.references import run_of
from genai_pl.training.hydra_job import job_overrides
from genai_pl.training.unused_options import EXPORT_RULES, refuse_unused

FORMATS = ("hf", "merged", "peft", "onnx", "gguf", "gguf_lora")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(config: DictConfig) -> int:
    """Write the model in the format asked for, and print what reads it; the exit status."""
    # options, before anything is loaded
    if config.format not in FORMATS:
        instead = "; its runtime reads format=onnx" if config.format in ("openvino", "executorch") else ""
        raise ConfigError(f"format={config.format} is not one of {', '.join(FORMATS)}{instead}")
    if config.dtype is not None and config.dtype not in DTYPES:
        raise ConfigError(f"dtype={config.dtype} is not one of {', '.join(DTYPES)}")
    _check_quantize(config)
    refuse_unused(config, job_overrides(), EXPORT_RULES)
    if not config.out:
        raise ConfigError("out='': name the folder to write")
    out = Path(config.out)
    if os.path.lexists(out):
        raise ConfigError(f"out={out}: exists already; name another, or remove it first")
    if config.average is not None and config.average < 2:
        raise ConfigError(f"average={config.average}: expected at least 2 checkpoints, or null")
    if config.format == "peft":
        return copy_adapter(config, out)
    # one model without adapters, in dtype= or the dtype of its files
    loaded = load_mean(config) if config.average else load(config.checkpoint, adapters=_adapters(config))
    model = loaded.model
    if config.format == "gguf_lora":
        print(f"adapter     {out}, read by {write_gguf_adapter(model, out, name=out.name)}")
        return 0
    if adapters_of(model):
        if config.format == "hf":
            raise ConfigError(
                "format=hf: this model has an adapter; format=merged folds it in, format=peft writes it alone"
            )
        model = merge(model)
    if config.dtype:
        model = model.to(DTYPES[config.dtype])
    elif config.format != "onnx" and not (config.format == "gguf" and config.quantize):
        _restore_dtypes(model, stored_dtypes(str(loaded.path) if config.average else config.checkpoint))
    # write, with tokenizer, generation defaults and model card
    if config.format == "onnx":
        reader = write_onnx(model, loaded, config)
    elif config.format == "gguf":
        reader = write_gguf_folder(model, loaded, out, quantize=config.quantize, name=out.name)
    else:
        card = {"Export": f"Written from `{config.checkpoint}`, format {config.format}."}
        options = {"card": card, "defaults": loaded.defaults, "files": sentence_files(loaded)}
        with read_alike(model, loaded.tokenizer):
            reader = export_model(model, loaded.tokenizer, out, **options)
    print(f"model       {out}, read by {reader}")
    return 0


def _check_quantize(config: DictConfig) -> None:
    """ConfigError for a quantization that the format does not have, or whose package is absent."""
    if config.format in ("gguf", "gguf_lora"):
        check_gguf_options(config.quantize)
    elif config.quantize and config.format != "onnx":
        raise ConfigError(
            f"quantize={config.quantize} goes with format=onnx (int8) or format=gguf ({', '.join(WRITABLE)})"
        )
    elif config.quantize not in (None, "int8"):
        raise ConfigError(f"quantize={config.quantize} is not null or int8, which format=onnx has")


def _adapters(config: DictConfig) -> list[str]:
    return [config.adapter] if config.adapter else []


def load_mean(config: DictConfig) -> Loaded:
    """The model of a run with the mean weights of its newest checkpoints; CheckpointError where there are too few."""
    run = run_of(config.checkpoint, "checkpoint")
    if run is None:
        raise CheckpointError(f"average={config.average}: of the checkpoints of a run; checkpoint= names none")
    by_step = {step_of(path): path for path in newest_checkpoints(run / "checkpoints")}  # a copied last.ckpt is a file
    found = [by_step[step] for step in sorted(by_step, reverse=True)]
    if len(found) < config.average:
        raise CheckpointError(
            f"average={config.average}: {run / 'checkpoints'} holds {len(found)}; "
            f"callbacks.checkpoint.keep={config.average} keeps as many in training"
        )
    chosen = found[: config.average]
    loaded = load(str(chosen[0]), adapters=_adapters(config))
    weights = mean_weights(chosen)
    missing = weights.keys() - loaded.model.state_dict().keys()
    if missing:
        raise CheckpointError(f"{chosen[0]}: does not fit its own model ({min(missing)})")
    loaded.model.load_state_dict(weights, strict=False)  # an adapter's checkpoint lacks its frozen base
    print(f"average     of steps {', '.join(str(step_of(path)) for path in chosen)}")
    return loaded


def sentence_files(loaded: Loaded) -> dict[str, object]:
    """Files and tensors for sentence-transformers that the model came with: pooling, dense layer; {} if it makes
    no vectors.
    """
    head = saved_sentence_head(loaded.path, loaded.tokenizer, loaded.model.config)
    return {} if head is None else {**head.files, **dict(head.tensors())}


def _restore_dtypes(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give each weight the dtype of its file: merging is done in the loaded precision and rounded once, here."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))


def copy_adapter(config: DictConfig, out: Path) -> int:
    """Copy the adapter of a run, or the one named; the exit status."""
    if config.adapter:
        folder = resolve_adapter(config.adapter)
    elif not ((folder := resolve(config.checkpoint)) / ADAPTER).is_file():
        raise CheckpointError(
            f"checkpoint={config.checkpoint}: no {ADAPTER} in {folder}: format=peft copies an adapter, format=hf a model"
        )
    write_atomic(out, lambda path: shutil.copytree(folder, path, dirs_exist_ok=True))
    print(f"adapter     {out}, read by PEFT")
    return 0


def write_onnx(model: nn.Module, loaded: Loaded, config: DictConfig) -> str:
    """Write ONNX graphs with configuration and tokenizer beside them; returns the names of what reads them."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"format=onnx needs {', '.join(missing)}: pip install -e '.[onnx]'")
    # refused here: the graph would be written, and no runtime would run it
    if config.dtype == "bf16":
        raise ConfigError("format=onnx: ONNX Runtime multiplies no bf16 on a CPU: leave dtype out, or dtype=fp16")

    def write(folder: Path) -> None:
        """Fill the folder: graphs, configuration, tokenizer, then quantized copies."""
        folder.mkdir()
        files = write_graphs(model, folder)
        ids, defaults = token_ids(loaded.tokenizer), loaded.defaults
        generation = generation_config_values(model.config, ids, defaults)
        write_description(model, folder, token_ids=ids | dict(defaults.config), generation=generation)
        save_tokenizer(loaded.tokenizer, folder)
        sizes = {name: getattr(model.config, name) for name in ("vocab_size", "max_seq_len")}
        for file in files if config.quantize else ():
            print(f"{file.stem:<12}{quantize_graph(file, **sizes)}")

    write_atomic(Path(config.out), write)
    return "ONNX Runtime, generate.py and serve.py" if model.config.writes else "ONNX Runtime"
