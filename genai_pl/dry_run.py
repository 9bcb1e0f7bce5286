"""What a run would cost: the configuration in, tables of memory, traffic and time out; nothing is built or trained."""

import os
from dataclasses import dataclass, replace

import torch
from omegaconf import DictConfig

from genai_pl import planning
from genai_pl.callbacks import duration
from genai_pl.callbacks.monitor import peak_flops
from genai_pl.counting import (
    activation_bytes,
    largest_gradient,
    largest_part,
    moments,
    n_again,
    part_of,
    stage_sizes,
    training_flops,
    weightless,
)
from genai_pl.data import pretrained_tokenizer
from genai_pl.devices import DTYPES
from genai_pl.errors import ConfigError
from genai_pl.kernels.projection import CHUNK_BYTES, GPU_CHUNK_BYTES
from genai_pl.models import Model, ModelConfig, build_model, n_parameters
from genai_pl.start import adapt, model_config
from genai_pl.summary import describe_model, describe_step, human


@dataclass(frozen=True)
class Plan:
    """A step of a run."""

    machine: planning.Machine
    layout: planning.Layout
    memory: planning.Memory  # of one device
    traffic: list[planning.Traffic]
    time: planning.Time
    tokens: int  # on all devices


def dry_run(config: DictConfig) -> int:
    """Print what the run would cost, from a model that takes no memory."""
    if "name" in config.model:
        raise ConfigError("dry_run=true needs a model of our own, not model=hf: its estimates know no other")
    if config.peft.init_from:
        raise ConfigError("dry_run=true reads no adapter: name its method, peft=lora, instead of peft.init_from")
    n_tokens = {"byte": 258, "bpe": config.tokenizer.get("vocab_size")}.get(config.tokenizer.kind)
    if n_tokens is None:
        n_tokens = len(pretrained_tokenizer(config.tokenizer.name))
    values = model_config(config, n_tokens)
    with weightless(torch.float32):
        model = adapt(config.peft, build_model(values), None)
    plan = make_plan(config, values, model)
    steps = max(config.trainer.max_steps, 0)
    shape = {"rows": config.data.batch_size, "seq_len": config.data.seq_len}
    accumulate = config.trainer.accumulate_grad_batches
    device = torch.device("cpu" if config.plan.gpu == "cpu" else "cuda")
    print(*describe_model(model, device), sep="\n")
    print(describe_step(model, **shape, accumulate=accumulate, devices=plan.layout.data, total_steps=steps))
    print(*describe_plan(plan, steps), sep="\n", flush=True)
    return 0


def make_plan(config: DictConfig, values: ModelConfig, model: Model) -> Plan:
    """Memory, traffic and time of a step, counted on what one device holds of the model."""
    layout, options = find_layout(config), config.trainer
    weight, product = DTYPES.get(config.precision.lightning, (torch.float32, torch.bfloat16))
    gathers = layout.zero == 3 and layout.data > 1
    rows, seq_len, passes = config.data.batch_size, config.data.seq_len, options.accumulate_grad_batches
    every = options.recompute_every if options.recompute is None else options.recompute_every or 1
    kind = options.recompute or "full"
    with weightless(product if gathers and product else weight):
        part = adapt(config.peft, build_model(part_of(values, layout)), None)
        head = part.lm_head
        share = planning.Share(
            weights=n_parameters(part),
            trained=n_parameters(part, trainable=True),
            largest=largest_part(part),
            largest_gradient=largest_gradient(part) if options.optimizer_in_backward else None,
            weight_bytes=weight.itemsize,
            compute_bytes=(product or weight).itemsize,
            moments=moments(config.optimizer._target_.rpartition(".")[2], part),
        )
        again = n_again(part, every) / len(part.blocks) if every and kind == "full" else 0.0
        activations = activation_bytes(
            part,
            rows=rows,
            seq_len=seq_len,
            product=product,
            every=every,
            kind=kind,
            fused=config.plan.gpu != "cpu",
            pieces=layout.tensor if layout.sequence else 1,
        )
    loss = planning.loss_bytes(
        tokens=rows * seq_len,
        vocab_size=0 if head is None else part.config.vocab_size,
        n_embd=values.n_embd,
        compute_bytes=share.compute_bytes,
        chunk_bytes=CHUNK_BYTES if config.plan.gpu == "cpu" else GPU_CHUNK_BYTES,
        head_learns=head is not None and head.weight.requires_grad,
    )
    if layout.stages > 1:
        share, memory = costliest_stage(model, share, layout, activations=activations, loss=loss)
    else:
        memory = planning.memory(share, layout, activations=activations, loss=loss)
    sizes = {"tokens": rows * seq_len, "n_layer": len(model.blocks), "n_embd": values.n_embd}
    sent = planning.traffic(share, layout, **sizes, passes=passes, again=again)
    tokens = rows * seq_len * passes * layout.data
    flops = training_flops(model, values, seq_len, again=again) * tokens / layout.devices
    machine = find_machine(config, layout)
    time = planning.step_time(machine, layout, sent, flops=flops)
    return Plan(machine, layout, memory, sent, time, tokens)


def costliest_stage(
    model: Model, share: planning.Share, layout: planning.Layout, *, activations: float, loss: float
) -> tuple[planning.Share, planning.Memory]:
    """What the stage of a pipeline holds that takes most: the first has the embeddings, the last the head and its loss."""
    found = []
    for stage, (weights, trained) in enumerate(stage_sizes(model, layout.stages)):
        own = replace(share, weights=weights, trained=trained)
        taken = loss if stage == layout.stages - 1 else 0.0
        found.append((own, planning.memory(own, layout, activations=activations, loss=taken, stage=stage)))
    return max(found, key=lambda stage: stage[1].total)


def find_layout(config: DictConfig) -> planning.Layout:
    """How the strategy lays the run on trainer.devices x trainer.num_nodes devices."""
    per_node = config.trainer.devices if isinstance(config.trainer.devices, int) else 1
    n = per_node * config.trainer.num_nodes
    if config.trainer.num_nodes == 1:
        per_node = config.plan.per_node
    strategy, target = config.strategy, config.strategy.get("_target_", "").rpartition(".")[2]
    if target == "ShardedStrategy":
        data, tensor = strategy.data_parallel_size, strategy.tensor_parallel_size
        tensor = n // (data or 1) if tensor is None else tensor
        data = data or n // tensor
        if data * tensor != n:
            raise ConfigError(
                f"strategy.data_parallel_size ({data}) x strategy.tensor_parallel_size ({tensor}) must be {n}, the "
                "number of devices"
            )
        again, cut = strategy.reshard_after_forward, strategy.sequence_parallel
        return planning.Layout(data=data, tensor=tensor, zero=3, per_node=per_node, regathers=again, sequence=cut)
    if target == "PipelineStrategy":
        data = strategy.data_parallel_size or n // strategy.pipeline_parallel_size
        stages = strategy.pipeline_parallel_size or n // data
        if data * stages != n:
            raise ConfigError(
                f"strategy.data_parallel_size ({data}) x strategy.pipeline_parallel_size ({stages}) must be {n}, the "
                "number of devices"
            )
        pipe = {"microbatches": strategy.microbatches, "gpipe": strategy.schedule == "gpipe"}
        return planning.Layout(data=data, stages=stages, per_node=per_node, **pipe)
    zero = strategy.stage if target == "deepspeed" else 0
    return planning.Layout(data=n, zero=zero, per_node=per_node, buckets=zero == 0)


def find_machine(config: DictConfig, layout: planning.Layout) -> planning.Machine:
    """The device of the group `plan`, with the FLOP/s of the run's precision; what a CPU leaves open is measured."""
    plan, precision = config.plan, config.precision
    kind = "bf16" if precision.lightning != "32-true" else "fp32" if precision.matmul == "highest" else "tf32"
    if precision.lightning == "transformer-engine" or precision.get("float8"):
        kind = "fp8"
    if plan.gpu == "cpu":
        flops = (plan[kind] or peak_flops(torch.device("cpu")) / 1e12) / min(layout.devices, layout.per_node)
        ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
        memory = (plan.memory or ram) / min(layout.devices, layout.per_node)
    else:
        flops, memory = plan[kind], plan.memory
    if flops is None:
        raise ConfigError(f"plan={plan.gpu} has no {kind}: choose another precision, or set plan.{kind}")
    return planning.Machine(
        plan.gpu, flops * 1e12, memory * 1e9, plan.link * 1e9, plan.network * 1e9, efficiency=plan.efficiency
    )


def describe_plan(plan: Plan, steps: int) -> list[str]:
    """Tables of memory, traffic and time."""
    memory, time, machine, layout = plan.memory, plan.time, plan.machine, plan.layout
    parts = ("weights", "gathered", "gradients", "optimizer", "activations", "loss")
    lines = ["memory      per device, estimated"]
    lines += [f"  {part:<12}{human(getattr(memory, part)):>10}" for part in parts if getattr(memory, part)]
    fits = "fits in" if memory.total < 0.95 * machine.memory else "DOES NOT FIT in"
    lines.append(f"  {'total':<12}{human(memory.total):>10}  {fits} the {human(machine.memory)} of {machine.name}")
    if plan.traffic:
        shape = {"data": layout.data, "tensor": layout.tensor, "stages": layout.stages}
        on = " x ".join(f"{n} ({name})" for name, n in shape.items() if n > 1)
        lines.append(f"traffic     per device and step, on {on} devices")
        lines += [
            f"  {t.what:<28}{human(t.n_bytes):>10}  among {t.group}{', across nodes' if t.across_nodes else ''}"
            for t in plan.traffic
        ]
    rate = plan.tokens / time.step
    lines += [
        f"time        per step, on {machine.name} at {machine.efficiency:.0%} of {machine.flops / 1e12:.4g} TFLOP/s",
        f"  {'computing':<28}{time.compute:>9.3g}s",
    ]
    if plan.traffic:
        lines.append(f"  {'communication':<28}{time.communication:>9.3g}s")
    lines.append(f"  {'step':<28}{time.step:>9.3g}s  bottleneck: {time.bottleneck}")
    whole = f"; {steps:,} steps in {duration(steps * time.step)}" if steps else ""
    return [*lines, f"rate        {rate:,.0f} tokens per second, {rate / layout.devices:,.0f} per device{whole}"]
