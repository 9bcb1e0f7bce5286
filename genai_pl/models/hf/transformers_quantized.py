"""Quantized folders for `model=hf`: transformers gets their weights as plain numbers, where it would ask for other packages."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from genai_pl.errors import ConfigError
from genai_pl.models.hf.folder import TensorFiles, read_json
from genai_pl.models.hf.quantized import check_quantization

THEIRS = ("mxfp4", "fp8")  # methods that transformers itself makes plain on any device


def reader(name: str) -> Callable[..., Any]:
    """`from_pretrained` of the class of a folder or hub id, which still takes its options.

    A quantized folder's takes a configuration without that and the unpacked weights. ConfigError for what is not read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    file = Path(name) / "config.json"
    options = read_json(file).get("quantization_config") if file.is_file() else None
    if options is None or (isinstance(options, dict) and options.get("quant_method") in THEIRS):
        return partial(AutoModelForCausalLM.from_pretrained, name)
    check_quantization(options)
    stored = TensorFiles(Path(name))
    if not stored.is_packed:
        raise ConfigError("quantization_config in its config.json, and no tensor beside it is packed so")
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    del config.quantization_config
    with torch.device("meta"):  # the class, which asks for a name of a folder otherwise
        model = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    weights = {weight: stored.read(weight) for weight in stored.weights()}
    return partial(model.from_pretrained, None, config=config, state_dict=weights)
