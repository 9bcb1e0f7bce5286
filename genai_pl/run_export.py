"""The export command: a model in, a folder for others out."""

import logging
import shutil
import warnings
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.export import export_model
from genai_pl.files import write_atomic
from genai_pl.load import load, resolve, resolve_adapter
from genai_pl.peft import adapters_of, merge

FORMATS = ("hf", "merged", "peft", "onnx")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(config: DictConfig) -> int:
    """Write the model in the format asked for."""
    if config.format not in FORMATS:
        raise ConfigError(f"format={config.format} is not one of {', '.join(FORMATS)}")
    if config.dtype is not None and config.dtype not in DTYPES:
        raise ConfigError(f"dtype={config.dtype} is not one of {', '.join(DTYPES)}")
    out = Path(config.out)
    if out.exists():
        raise ConfigError(f"out={out}: exists already; name another, or remove it first")
    if config.format == "peft":
        return copy_adapter(config, out)
    loaded = load(config.checkpoint, adapters=[config.adapter] if config.adapter else ())
    model = loaded.model
    if adapters_of(model):
        if config.format == "hf":
            raise ConfigError(
                "format=hf: this model has an adapter; format=merged folds it in, format=peft writes it alone"
            )
        model = merge(model)
    model = model.to(DTYPES[config.dtype]) if config.dtype else model
    if config.format == "onnx":
        reader = write_onnx(model, out)
    else:
        card = {"Export": f"Written from `{config.checkpoint}`, format {config.format}."}
        reader = export_model(model, loaded.tokenizer, out, card=card)
    print(f"model       {out}, read by {reader}")
    return 0


def copy_adapter(config: DictConfig, out: Path) -> int:
    """Copy the adapter of a run, or the one named."""
    reference = config.adapter or str(resolve(config.checkpoint))
    folder = resolve_adapter(reference)
    write_atomic(out, lambda path: shutil.copytree(folder, path, dirs_exist_ok=True))
    print(f"adapter     {out}, read by PEFT")
    return 0


class _Logits(nn.Module):
    """input_ids (B, T) to logits (B, T, V) and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids)


def write_onnx(model: nn.Module, out: Path) -> str:
    """Write logits as an ONNX graph over batches and lengths of any size."""
    try:
        import onnxscript  # noqa: F401  torch's exporter asks for it much later, and in many lines
    except ImportError:
        raise ConfigError("format=onnx needs onnx and onnxscript: pip install -e '.[onnx]'") from None
    if not model.config.writes or model.config.n_decoder_layer:
        raise ConfigError("format=onnx writes decoders")
    example = torch.zeros(2, 8, dtype=torch.long)
    sizes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=model.config.max_seq_len)}}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    program = torch.onnx.export(_Logits(model.eval()), (example,), dynamo=True, dynamic_shapes=sizes, verbose=False)
    write_atomic(out, lambda path: program.save(str(path)))
    return "ONNX Runtime"
