"""The generate command: a resolved configuration in, text on stdout out."""

import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from genai_pl.devices import DTYPES, choose_device
from genai_pl.errors import ConfigError, DataError
from genai_pl.generation import generate_text
from genai_pl.load import load
from genai_pl.peft import adapters_of


def generate(config: DictConfig) -> int:
    """Print continuations of the prompts; a single one is printed while it grows."""
    if config.num_samples < 1:
        raise ConfigError(f"num_samples={config.num_samples} must be at least 1")
    prompts, names = read_prompts(config), adapter_names(config)
    device = choose_device(config.device)
    weights, products = DTYPES[config.precision.lightning]
    loaded = load(config.checkpoint, dtype=weights, adapters=names)
    model = loaded.model.to(device)
    choices = choose_adapters(model, names, config.adapter_weights, len(prompts), config.num_samples)
    generator = torch.Generator(device).manual_seed(config.seed)
    single = len(prompts) * config.num_samples * choices == 1
    streaming = config.stream and single
    if single:
        print(prompts[0], end="", flush=True)
    mixed = torch.autocast(device.type, dtype=products, enabled=products is not None)
    with torch.inference_mode(), mixed:
        texts = generate_text(
            model,
            loaded.tokenizer,
            prompts * choices,
            OmegaConf.to_object(config.generation),
            generator=generator,
            num_samples=config.num_samples,
            on_text=(lambda _, piece: print(piece, end="", flush=True)) if streaming else None,
        )
    if single:
        print("" if streaming else texts[0][0], flush=True)
        return 0
    for n, (prompt, samples) in enumerate(zip(prompts * choices, texts, strict=True)):
        for text in samples:
            heading = f"[{names[n // len(prompts)]}] " if choices > 1 else ""
            print(f"{heading}{prompt}{text}\n{'-' * 40}", flush=True)
    return 0


def adapter_names(config: DictConfig) -> list[str]:
    """The adapters asked for: one, several, or none."""
    if config.adapter is None:
        return []
    return [config.adapter] if isinstance(config.adapter, str) else list(config.adapter)


def choose_adapters(
    model: nn.Module, names: list[str], weights: list[float] | None, n_prompts: int, num_samples: int
) -> int:
    """Set how much of each adapter counts for each row, and return how often every prompt is continued."""
    found = adapters_of(model)[-len(names) :] if names else []
    if weights is not None:
        if len(weights) != len(names):
            raise ConfigError(f"adapter_weights has {len(weights)} numbers for {len(names)} adapters")
        for adapter, weight in zip(found, weights, strict=True):
            adapter.weight = float(weight)
        return 1
    if len(names) < 2:
        return 1
    rows = torch.arange(len(names)).repeat_interleave(n_prompts * num_samples)  # the adapter of each row
    for n, adapter in enumerate(found):
        adapter.rows = (rows == n).float().to(next(model.parameters()).device)
    return len(names)


def read_prompts(config: DictConfig) -> list[str]:
    """The prompt given, the lines of prompt_file, or all of stdin."""
    if config.prompt is not None:
        return [config.prompt]
    if config.prompt_file is None:
        return [sys.stdin.read()]
    path = Path(config.prompt_file)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompt_file={path}: cannot be read ({error})") from None
    if not lines:
        raise DataError(f"prompt_file={path}: empty")
    return lines
