"""The generate command: a resolved configuration in, text on stdout out."""

import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from genai_pl.devices import DTYPES, choose_device
from genai_pl.errors import ConfigError, DataError
from genai_pl.generation import generate_text
from genai_pl.load import load


def generate(config: DictConfig) -> int:
    """Print continuations of the prompts; a single one is printed while it grows."""
    if config.num_samples < 1:
        raise ConfigError(f"num_samples={config.num_samples} must be at least 1")
    prompts = read_prompts(config)
    device = choose_device(config.device)
    weights, products = DTYPES[config.precision.lightning]
    loaded = load(config.checkpoint, dtype=weights)
    model = loaded.model.to(device)
    generator = torch.Generator(device).manual_seed(config.seed)
    single = len(prompts) * config.num_samples == 1
    streaming = config.stream and single
    if single:
        print(prompts[0], end="", flush=True)
    mixed = torch.autocast(device.type, dtype=products, enabled=products is not None)
    with torch.inference_mode(), mixed:
        texts = generate_text(
            model,
            loaded.tokenizer,
            prompts,
            OmegaConf.to_object(config.generation),
            generator=generator,
            num_samples=config.num_samples,
            on_text=(lambda _, piece: print(piece, end="", flush=True)) if streaming else None,
        )
    if single:
        print("" if streaming else texts[0][0], flush=True)
        return 0
    for prompt, samples in zip(prompts, texts, strict=True):
        for text in samples:
            print(f"{prompt}{text}\n{'-' * 40}", flush=True)
    return 0


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
