"""The run behind an estimate: its model's configuration, batch and device layout, from configuration files alone.

Where a run reads data or weights, an estimate reads config.json and the checkpoint's metadata. What only data can
tell, such as the steps of one pass, is left open.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from omegaconf import DictConfig

from genai_pl.atomic_io import ADAPTER, is_checkpoint, is_gguf
from genai_pl.callbacks.monitor import peak_flops, products_dtype
from genai_pl.checkpoints.file import MARK, read_contents
from genai_pl.data import add_missing_tokens, byte_tokenizer, pretrained_tokenizer
from genai_pl.data.tokenizer import tokenizer_from_files
from genai_pl.devices import memory_bytes
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.loading import describe_gguf
from genai_pl.models import ModelConfig
from genai_pl.models.hf.config import is_supported, prefix_of, read_config
from genai_pl.models.hf.folder import TensorFiles
from genai_pl.modules import BaseModule
from genai_pl.modules.kto import KTOModule
from genai_pl.modules.policy_gradient import PolicyGradientModule
from genai_pl.modules.preference import PreferenceModule
from genai_pl.objectives.preference import WITH_REFERENCE
from genai_pl.planning import cost_model as planning
from genai_pl.references import folder_of, is_hub_id, resolve
from genai_pl.strategies.pipeline_stages import LOOPED
from genai_pl.training.compilation import check_compile
from genai_pl.training.initial_model import check_loaded_model, model_config, new_overrides, routed_config
from genai_pl.training.length import DEFAULT_PASSES, DEFAULT_STEPS
from genai_pl.training.report import texts_of_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DeviceWork(NamedTuple):
    """Work of one device in an optimizer step.

    rows: sequences of one forward and backward pass. seq_len: their tokens. passes: micro-batches of a step.
    unlearned: forward passes without gradient for each of these, by the reference model or the policy before
    its update.
    reference: True if a frozen copy of the model is held. prompts: of a rollout, None without one. completions:
    of each prompt.
    n_updates: optimizer steps per rollout.
    """

    rows: int  # of a forward and backward pass
    seq_len: int
    passes: int  # this many of them in a step
    unlearned: float  # forward passes without a gradient beside each: of the reference, of the policy that wrote
    reference: bool  # whether a frozen copy of the model, as it was, is kept
    prompts: int | None = None  # of a rollout
    completions: int = 1  # of each prompt
    n_updates: int = 1  # steps that a rollout is good for


def planned_model_config(config: DictConfig, objective: type[BaseModule]) -> ModelConfig:
    """Configuration of the model that the run would train, its vocabulary with the tokens that the objective
    needs.
    """
    check_compile(config)
    if "name" in config.model:
        raise ConfigError("dry_run=true needs a model of our own, not model=hf: its estimates know no other")
    if config.init_from:
        model_settings, tokenizer = read_stored_config(config.init_from, option="init_from")
        model_settings = routed_config(model_settings, config.model)
        check_loaded_model(config, model_settings, tokenizer, new_overrides(config))
        add_missing_tokens(tokenizer, objective.needs)
        model_settings = replace(model_settings, attention=config.model.attention, dropout=config.model.dropout)
        return replace(model_settings, vocab_size=max(model_settings.vocab_size, len(tokenizer)))
    # bpe learns vocab_size tokens, less the bytes and special tokens it begins with
    kind = config.tokenizer.kind
    tokenizer = byte_tokenizer() if kind in ("byte", "bpe") else pretrained_tokenizer(config.tokenizer.name)
    n_learned = config.tokenizer.vocab_size - len(tokenizer) if kind == "bpe" else 0
    add_missing_tokens(tokenizer, objective.needs)
    return model_config(config, len(tokenizer) + n_learned)


def read_stored_config(reference: str, *, option: str) -> tuple[ModelConfig, "PreTrainedTokenizerBase"]:
    """Configuration and tokenizer in a run folder, a .ckpt or a Hugging Face folder; ConfigError for adapters and
    foreign models.
    """
    if is_hub_id(reference):
        path = folder_of(reference)
        if not path.is_dir():
            raise CheckpointError(f"{option}={reference}: not here, and dry_run=true downloads nothing")
    else:
        path = resolve(reference, option=option)
    adapter_error = ConfigError(
        f"dry_run=true reads no adapter, and {option}={reference} holds one: name its base, and its method as peft=lora"
    )
    # a checkpoint's metadata, or config.json and the names of its tensors
    if is_checkpoint(path):
        contents = read_contents(path)[MARK]
        if contents.get("peft"):
            raise adapter_error
        if "wrapped" in contents["model"]:
            raise ConfigError(
                f"dry_run=true needs a model of our own, and {option}={reference} is one of transformers'"
            )
        return ModelConfig.from_dict(contents["model"]), tokenizer_from_files(contents["tokenizer"])
    if is_gguf(path):
        return describe_gguf(path)
    if (path / ADAPTER).is_file():
        raise adapter_error
    file = path / "config.json"
    if not file.is_file() or not is_supported(file):
        raise ConfigError(f"dry_run=true needs a model of our own, and {option}={reference} is no folder of one")
    values, _ = read_config(file, TensorFiles(path, prefix_of(file)))
    return values, pretrained_tokenizer(str(path))


def planned_work(config: DictConfig, objective: type[BaseModule], rows: int, seq_len: int) -> DeviceWork:
    """Work of a device for batches of `rows` rows: the rows, both texts of pairs, or a micro-batch of a rollout."""
    options, has_adapter = config.objective, config.peft._target_ is not None
    passes = config.trainer.accumulate_grad_batches
    if issubclass(objective, PolicyGradientModule):
        completions = rows * options.get("group_size", 1)
        step = options.minibatch_size or completions
        micro_batch = min(options.micro_batch_size or step, step)
        return DeviceWork(
            rows=micro_batch,
            seq_len=seq_len,
            passes=-(-step // micro_batch),
            unlearned=2 / options.epochs,  # under the policy that wrote and the reference, once for a rollout
            reference=not has_adapter,
            prompts=rows,
            completions=options.get("group_size", 1),
            n_updates=options.epochs * -(-completions // step),
        )
    if objective.needs_teacher:
        raise ConfigError(
            "dry_run=true does not estimate a teacher; ask for objective=clm and add the teacher's weights"
        )
    # losses with a reference: one more forward pass, unless precomputed
    texts = texts_of_row(objective.data_kind, config.data)
    unlearned, reference = 0.0, False
    if issubclass(objective, PreferenceModule) and options.loss in WITH_REFERENCE:
        unlearned, reference = 1.0 - options.precompute_reference, not has_adapter
    if issubclass(objective, KTOModule):
        unlearned, reference = (
            3.0,
            not has_adapter,
        )  # both models on completions of other prompts, and the reference on these
    return DeviceWork(rows * texts, seq_len, passes, unlearned, reference)


def planned_steps(config: DictConfig, objective: type[BaseModule]) -> tuple[int | None, int | None]:
    """Optimizer steps, or else passes over the data, whose length an estimate does not know."""
    options = config.trainer
    if options.max_epochs is not None:
        return None, options.max_epochs
    if options.max_steps is not None:
        return options.max_steps, None
    fine_tunes = config.init_from and objective.data_kind != "text"
    return (None, DEFAULT_PASSES) if fine_tunes else (DEFAULT_STEPS, None)


def devices_per_node(config: DictConfig) -> int:
    """Devices that `trainer.devices` means on a machine of `plan`: auto and -1 all of a node, and one of a CPU."""
    devices = config.trainer.devices
    if str(devices) in ("auto", "-1"):
        return 1 if config.plan.gpu == "cpu" else config.plan.per_node
    # how many, or the numbers of each, as Lightning reads them
    numbers = devices.split(",") if isinstance(devices, str) and "," in devices else devices
    try:
        n = len(numbers) if not isinstance(numbers, (int, str)) else int(numbers)
    except ValueError:
        n = 0
    if n < 1:
        raise ConfigError(f"trainer.devices={devices}: a number of at least 1, a list of numbers, or auto")
    return n


def device_layout(config: DictConfig) -> planning.Layout:
    """Devices by data, tensor and pipeline parallelism, as the strategy divides devices x num_nodes; ConfigError
    if it cannot.
    """
    per_node = devices_per_node(config)
    n = per_node * config.trainer.num_nodes
    if config.trainer.num_nodes == 1:
        per_node = config.plan.per_node
    strategy, target = config.strategy, config.strategy.get("_target_", "").rpartition(".")[2]
    # FSDP2 with tensor parallelism
    if target == "ShardedStrategy":
        data, tensor, context = (strategy[f"{kind}_parallel_size"] for kind in ("data", "tensor", "context"))
        tensor = n // ((data or 1) * context) if tensor is None else tensor
        data = data or n // (tensor * context)
        if data * context * tensor != n:
            of_context = f" x strategy.context_parallel_size ({context})" if context > 1 else ""
            raise ConfigError(
                f"strategy.data_parallel_size ({data}){of_context} x strategy.tensor_parallel_size ({tensor}) must be {n}, "
                "the number of devices"
            )
        regathers, sequence = strategy.reshard_after_forward, strategy.sequence_parallel
        experts = strategy.expert_parallel_size
        if experts > 1 and (tensor > 1 or data % experts):
            raise ConfigError(
                f"strategy.expert_parallel_size ({experts}) must divide strategy.data_parallel_size ({data}), and "
                "strategy.tensor_parallel_size must be 1"
            )
        sizes = {"data": data, "experts": experts, "context": context, "tensor": tensor, "per_node": per_node}
        copies = strategy.replicate_size
        return planning.Layout(**sizes, copies=copies, zero=3, regathers=regathers, sequence=sequence)
    # pipeline stages with data parallelism
    if target == "PipelineStrategy":
        data = strategy.data_parallel_size or n // strategy.pipeline_parallel_size
        stages = strategy.pipeline_parallel_size or n // data
        if data * stages != n:
            raise ConfigError(
                f"strategy.data_parallel_size ({data}) x strategy.pipeline_parallel_size ({stages}) must be {n}, the "
                "number of devices"
            )
        kind = strategy.schedule
        loops = strategy.stages_per_rank or 1 + (kind in LOOPED)
        schedule = {"gpipe": kind == "gpipe", "loops": loops, "zero_bubble": kind == "zero_bubble"}
        schedule["micro_batches"] = strategy.microbatches
        return planning.Layout(data=data, stages=stages, per_node=per_node, **schedule)
    # DDP, or DeepSpeed's ZeRO stage
    zero = strategy.stage if target == "deepspeed" else 0
    return planning.Layout(data=n, zero=zero, per_node=per_node, buckets=zero == 0)


def plan_machine(config: DictConfig, layout: planning.Layout) -> planning.Machine:
    """The device of the group `plan`, with the peak FLOP/s of the run's precision; a CPU's speed is measured if it
    is not given.
    """
    plan, precision = config.plan, config.precision
    rate = "bf16" if precision.lightning != "32-true" else "fp32" if precision.matmul == "highest" else "tf32"
    if precision.lightning == "transformer-engine" or precision.get("float8"):
        rate = "fp8"
    if plan.gpu == "cpu":
        shared_by = min(layout.devices, layout.per_node)
        measured = None if plan[rate] else peak_flops(torch.device("cpu"), products_dtype(precision.lightning)) / 1e12
        flops = (plan[rate] or measured) / shared_by
        ram = memory_bytes(torch.device("cpu")) / 1e9
        memory = (plan.memory or ram) / shared_by
    else:
        flops, memory = plan[rate], plan.memory
    if flops is None:
        raise ConfigError(f"plan={plan.gpu} has no {rate}: choose another precision, or set plan.{rate}")
    return planning.Machine(
        plan.gpu, flops * 1e12, memory * 1e9, plan.link * 1e9, plan.network * 1e9, efficiency=plan.efficiency
    )
