"""Python API: `train` and `generate` as functions, with the configuration of the commands and errors as exceptions."""

from collections.abc import Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from genai_pl import signals
from genai_pl.cli.command import CONF, register
from genai_pl.cli.quoting import quote_argument
from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError, TrainingError
from genai_pl.generation import complete, encode_prompt
from genai_pl.loading import Loaded, load, load_draft
from genai_pl.models import prepare_for_decoding
from genai_pl.training.config_errors import check_bounds, check_choices, check_types, explain_config_error
from genai_pl.training.output_folders import remove_unstarted
from genai_pl.training.resume import replay
from genai_pl.training.run_log import recording


def train(*overrides: str) -> Path:
    """Train as `python train.py OVERRIDES` would, in this process; returns the run folder.

    UserError for a mistake in the overrides, TrainingError if a signal stopped the run before its last step.
    """
    from genai_pl.training.train import train as run

    try:
        with recording(), signals.handle_signals():
            config = _composed([quote_argument(override) for override in replay(list(overrides))])
            folder = Path(config.output_dir)
            if run(config).status:
                raise TrainingError(f"{folder}: stopped by a signal; continue it with resume={folder}")
    finally:
        remove_unstarted()
    return folder


def generate(model: str | Loaded, prompt: str | Sequence[str], *, seed: int = 0, **settings: object) -> str | list[str]:
    """The continuation of a prompt, or a list of them for a list of prompts.

    model: what `load` returns, or a reference that it takes: a run folder, .ckpt, Hugging Face folder, hub id, or "auto".
    seed: of the sampling. settings: fields of `GenerationConfig`; `draft` is a reference too.
    """
    loaded = model
    # a model loaded here belongs to no one else, so its projections may be fused for decoding
    if isinstance(model, str):
        loaded = load(model, onnx=True)
        prepare_for_decoding(loaded.model)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    generator = torch.Generator(loaded.model.embed.weight.device).manual_seed(seed)
    config = GenerationConfig(**settings)
    rows = [encode_prompt(loaded.tokenizer, prompt) for prompt in prompts]
    options = {"generator": generator, "draft": load_draft(config.draft, loaded)}
    texts = [row[0].text for row in complete(loaded.model, loaded.tokenizer, rows, config, **options)]
    return texts[0] if isinstance(prompt, str) else texts


def _composed(overrides: list[str]) -> DictConfig:
    """The configuration of a run as Hydra's command composes and checks it, with the run folder resolved."""
    register()
    check_choices(overrides, CONF)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3", job_name="train"):
            config = compose("config", overrides=overrides, return_hydra_config=True)
    except Exception as error:
        line = explain_config_error(error, CONF, "config", overrides)
        if line is None:
            raise
        raise ConfigError(line) from None
    # what Hydra's own launcher does: fix the folder, publish the configuration, drop the node `hydra`
    folder = Path(config.hydra.run.dir).resolve()
    with open_dict(config):
        config.hydra.runtime.output_dir = str(folder)
        HydraConfig.instance().set_config(config)
        task_overrides = [o for o in overrides if not o.startswith("hydra.")]
        config.pop("hydra")
    check_types(config, task_overrides, CONF, "config")
    check_bounds(config)
    return config
