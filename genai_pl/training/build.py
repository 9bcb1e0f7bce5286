"""Objects of a run, built from its configuration in order: model, data, module, trainer.

Configuration stops here: lower layers than training/ take plain typed arguments. Nothing changes the configuration,
and what comes back is complete: whoever trains it sets no attribute of it. The order is one of cost: checks that
need no data first, then the model, then tokenization, so that a mistake shows in seconds.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from genai_pl.checkpoints.file import MARK, read_contents
from genai_pl.config.enums import Shape
from genai_pl.data import special_tokens
from genai_pl.data.turns import Turns
from genai_pl.devices import choose_device
from genai_pl.errors import ConfigError
from genai_pl.loading import load
from genai_pl.models import Model
from genai_pl.models.compile_choice import compile_blocks
from genai_pl.modules import BaseModule
from genai_pl.modules.base import n_replicas
from genai_pl.modules.policy_gradient import PolicyGradientModule
from genai_pl.peft import hold_base_in_16_bits
from genai_pl.strategies import float8
from genai_pl.training.compilation import check_compile
from genai_pl.training.data_sources import build_data
from genai_pl.training.environments import load_environment
from genai_pl.training.fit import Run
from genai_pl.training.initial_model import (
    apply_peft,
    build_initial_model,
    check_loaded_model,
    check_shape,
    fit_to_context,
    new_overrides,
    report_unused,
    save_base,
)
from genai_pl.training.label_head import set_objective_head
from genai_pl.training.length import check_length, overrun_line, read_stored_length, with_warmup
from genai_pl.training.precision import choose_precision, may_hold_in_16_bits
from genai_pl.training.rewards import load_rewards
from genai_pl.training.targets import instantiate, locate_target
from genai_pl.training.teachers import build_teacher
from genai_pl.training.trainer import (
    build_trainer,
    choose_run_length,
    limit_steps,
    prepare_loggers,
    prepare_strategy,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)


def build(config: DictConfig, folder: Path, checkpoint: Path | None = None) -> Run:
    """The complete Run of a configuration.

    folder: the run folder, which exists. checkpoint: where a resumed run goes on; its stored length decides the
    defaults. Raises ConfigError and DataError for options and data that do not fit each other.
    """
    # what can be refused before anything is read
    lengths = {name: config.trainer[name] for name in ("max_steps", "max_epochs")}
    check_length(**lengths, warmup_steps=config.scheduler.get("warmup_steps"))
    check_compile(config)
    new_options = new_overrides(config)
    report_unused(config, new_options)
    objective = locate_target(config.objective._target_)
    data = build_data(config, objective)

    # the model as it is before the first step
    initial = build_initial_model(config, data, objective)
    model, tokenizer = initial.model, initial.tokenizer
    if config.init_from or "name" in config.model:
        check_loaded_model(config, model.config, tokenizer, new_options)
    check_shape(config, model.config, objective)
    set_objective_head(model, objective, data, tokenizer)
    adapter_base = save_base(config, folder, initial)
    model = apply_peft(config.peft, model, tokenizer)

    # batches that fit its context
    batch_size, seq_len, clamp_message = fit_to_context(config, model)
    data.fit_to_model(seq_len=seq_len, batch_size=batch_size, val_batch_size=config.data.val_batch_size or batch_size)
    if clamp_message:
        rank_zero_only(log.info)("clamped     %s", clamp_message)

    # precision of matrix products: a resumed run keeps it
    contents = None if checkpoint is None else read_contents(checkpoint)
    device = choose_device("cpu" if config.trainer.accelerator == "cpu" else "auto")
    stored_precision = None if contents is None else contents[MARK].get("precision", "32-true")
    precision = choose_precision(
        config.precision, n_embd=model.config.n_embd, device=device.type, stored=stored_precision
    )
    torch.set_float32_matmul_precision(precision.matmul)
    holds_in_16_bits = precision.lightning == "bf16-mixed" and may_hold_in_16_bits(config)
    if holds_in_16_bits:
        hold_base_in_16_bits(model)

    # the objective and the Trainer, whose mistakes come before the data are tokenized
    module = build_module(config, model, tokenizer)
    if holds_in_16_bits and module.reference is not None and module.reference.copy is not None:
        hold_base_in_16_bits(module.reference.copy)
    if objective.embeds:
        module.use_sentence(initial.sentence, tokenizer)
    if objective.weighs_classes:
        module.use_targets(data.label_targets())
    if objective.needs_reward:
        connect_reward(config, module, tokenizer, device)
    if objective.needs_teacher:
        module.use_teacher(build_teacher(module, tokenizer, in_16_bits=holds_in_16_bits))
    module.source_names = data.source_names
    stored = {} if contents is None else contents[MARK]
    trainer, callbacks = build_trainer(
        config, folder, precision=precision, module=module, data=data, tokenizer=tokenizer, stored=stored
    )
    data.prepare(tokenizer, module.collator)

    # the length, which depends on how many rows there are
    stored_length = None if contents is None else read_stored_length(contents[MARK])
    length = choose_run_length(config, data, module, n_replicas(trainer), stored_length)
    epochs = config.trainer.max_epochs
    if stored_length and (line := overrun_line(length, contents["global_step"], stored_length, max_epochs=epochs)):
        log.warning(line)
    module.set_run_length(length.steps, with_warmup(module.schedule, length.steps, stored_length))
    limit_steps(trainer, length.steps)
    n_batches = length.steps * trainer.accumulate_grad_batches
    data.limit_batches(n_batches, expected=-(-n_batches // module.n_updates(batch_size)))

    origins = {"defaults": initial.defaults, "adapter_base": adapter_base}
    run = Run(folder, trainer, module, data, tokenizer, length, precision, **callbacks, **origins)
    prepare_strategy(config, run)
    prepare_loggers(trainer, checkpoint)
    return run


def build_module(config: DictConfig, model: Model, tokenizer: "PreTrainedTokenizerBase") -> BaseModule:
    """The LightningModule of the objective, around the model, with its optimizer and schedule still to be made."""
    # torchao replaces linear layers, before the module counts parameters
    if config.precision.get("float8"):
        float8(model)
    tokens = special_tokens(tokenizer, model.config.vocab_size)
    if model.config.shape is Shape.encoder_decoder:
        tokens = tokens._replace(start=model.config.decoder_start_token_id)
    # the objective's _target_ is partial: what is not an option comes from here
    module = instantiate(config.objective)(
        model,
        vocabulary=tokens,
        seed=config.seed,
        optimizer=instantiate(config.optimizer),
        schedule=instantiate(config.scheduler),
    )
    # built once here: mistakes show before the data are read
    module.make_optimizer(module.named_parameters_for_optimizer())
    if config.compile is True:
        compile_blocks(model)
    return module


def connect_reward(
    config: DictConfig, module: PolicyGradientModule, tokenizer: "PreTrainedTokenizerBase", device: torch.device
) -> None:
    """Give a module that learns from rewards its reward function, on this device, its critic, and the gradient clipping
    that Lightning leaves to it.

    Such a module makes several optimizer steps per batch of prompts, so Lightning neither accumulates nor clips
    for it.
    """
    if config.trainer.accumulate_grad_batches != 1:
        raise ConfigError(
            "trainer.accumulate_grad_batches: rollouts have minibatches instead (objective.minibatch_size)"
        )
    reward = None
    if module.environment_name is None:
        weights = {"weights": module.reward_weights, "uncertainty": module.reward_uncertainty}
        weights["step_rewards"] = module.step_rewards
        reward = load_rewards(module.reward_names, **weights, policy=module.model, device=device)
    else:
        if module.reward_names:
            raise ConfigError("objective.reward: the environment gives the rewards; set objective.reward=null")
        arguments = OmegaConf.to_container(config.objective.environment_args or OmegaConf.create(), resolve=True)
        environment = load_environment(module.environment_name, arguments)
        module.use_environment(environment, Turns(tokenizer))
    if module.critic_name is not None:
        module.use_critic(load(module.critic_name, option="objective.critic").model)
    module.use_reward(
        reward,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        clip_norm=config.trainer.gradient_clip_val,
    )
