"""Cost estimate of a run: configuration in, tables of memory, traffic and time out. Nothing is built, read or trained.

The model is built on fake tensors, which have shapes and no storage, so that parameters, activations and FLOPs are
counted on the real modules rather than by formulas that drift from them. planning/cost_model.py adds what the
strategy does to them. tests/planning compares the results with published figures (ZeRO's memory within 3 %); the
time rests on `plan.efficiency`.
"""

from dataclasses import dataclass, fields, replace

import torch
from omegaconf import DictConfig

from genai_pl.callbacks import duration
from genai_pl.callbacks.monitor import products_dtype
from genai_pl.cli.planned_run import (
    DeviceWork,
    device_layout,
    plan_machine,
    planned_model_config,
    planned_steps,
    planned_work,
    read_stored_config,
)
from genai_pl.cli.planned_strategy import check_planned_strategy, kept_in_ram
from genai_pl.config.enums import Head
from genai_pl.config.labels import Labels
from genai_pl.devices import DTYPES
from genai_pl.errors import ConfigError
from genai_pl.kernels.chunked_logits import CHUNK_BYTES, GPU_CHUNK_BYTES
from genai_pl.models import Model, ModelConfig, build_model, flops_per_token, n_parameters
from genai_pl.modules import BaseModule
from genai_pl.planning import cost_model as planning
from genai_pl.planning.count import (
    Activations,
    activation_bytes,
    expert_parameters,
    fake_tensors,
    keep_exact,
    largest_gradient,
    largest_part,
    local_model_config,
    moments,
    n_recomputed,
    quantized_weights,
    stage_sizes,
    training_flops,
)
from genai_pl.training.initial_model import apply_peft, check_shape, fit_to_context, new_overrides, report_unused
from genai_pl.training.length import check_length
from genai_pl.training.precision import plan_precision
from genai_pl.training.report import describe_model, describe_rollout, describe_step, format_bytes
from genai_pl.training.targets import locate_target


@dataclass(frozen=True)
class StepEstimate:
    """Estimate of one optimizer step.

    machine: the device with its FLOP/s, bytes and GB/s. layout: devices by kind of parallelism. memory: bytes
    of one device. in_ram: bytes of one process outside of it, where shards are offloaded.
    traffic: bytes sent, one entry per collective. time: seconds. tokens: of the step, on all devices.
    """

    machine: planning.Machine
    layout: planning.Layout
    memory: planning.Memory  # of one device
    traffic: list[planning.Traffic]
    time: planning.Time
    tokens: int  # on all devices
    in_ram: float = 0.0  # beside `memory`, of each process


def dry_run(config: DictConfig) -> int:
    """Print what the run would cost; the exit status."""
    if config.peft.init_from:
        raise ConfigError("dry_run=true reads no adapter: name its method, peft=lora, instead of peft.init_from")
    # the same checks as a run makes, in the same order
    lengths = {name: config.trainer[name] for name in ("max_steps", "max_epochs")}
    check_length(**lengths, warmup_steps=config.scheduler.get("warmup_steps"))
    report_unused(config, new_overrides(config))
    objective = locate_target(config.objective._target_)
    model_config = planned_model_config(config, objective)
    check_shape(config, model_config, objective)
    config = plan_precision(config, n_embd=model_config.n_embd)
    # the model, its batch, and the step
    with fake_tensors(torch.float32):
        model = build_full_model(config, objective, model_config)
    batch_size, seq_len, clamp_message = fit_to_context(config, model)
    check_planned_strategy(config, objective, model, rows=batch_size)
    work = planned_work(config, objective, batch_size, seq_len)
    estimate = estimate_step(config, objective, model_config, model, work)
    steps, epochs = planned_steps(config, objective)
    # the lines that a run prints, then the tables
    device = torch.device("cpu" if config.plan.gpu == "cpu" else "cuda")
    dtype = products_dtype(config.precision.lightning)
    print(*describe_model(model, device, dtype=dtype, seq_len=seq_len), sep="\n")
    if clamp_message:
        print(f"clamped     {clamp_message}")
    counts = {"devices": estimate.layout.data, "total_steps": steps}
    if work.prompts is not None:
        options = {"prompts": work.prompts, "group_size": work.completions, "n_updates": work.n_updates}
        options["max_turns"] = config.objective.max_turns if config.objective.environment else None
        print(describe_rollout(**options, max_new_tokens=config.objective.max_new_tokens, **counts))
    print(describe_step(model, rows=work.rows, seq_len=work.seq_len, accumulate=work.passes, **counts))
    if epochs is not None:
        print(f"length      {epochs} passes over the data, which a plan does not read")
    print(*describe_estimate(estimate, steps), sep="\n", flush=True)
    if work.prompts is not None:
        print("left out    the time that writing completions and judging them takes, and the memory of a reward model")
    return 0


def build_full_model(config: DictConfig, objective: type[BaseModule], model_config: ModelConfig) -> Model:
    """The model that the run trains, with its head and adapters, on whatever device and dtype is the default."""
    model = build_model(model_config)
    if objective.head is not None:  # the data, which are not read, name the labels
        named = config.data.get("labels")
        names = ("0", "1") if named is None or isinstance(named, str) else named  # a text: a column of labels
        model.set_head(objective.head, Labels(tuple(names)) if objective.labelled else None)
    return apply_peft(config.peft, model, None)


def estimate_step(
    config: DictConfig, objective: type[BaseModule], model_config: ModelConfig, model: Model, work: DeviceWork
) -> StepEstimate:
    """Estimate of a step, counted on the part of the model that one device holds."""
    layout = device_layout(config)
    weight_dtype, matmul_dtype = DTYPES.get(config.precision.lightning, (torch.float32, torch.bfloat16))
    gathers = layout.zero == 3 and layout.shards > 1
    own_tokens = work.rows * -(-work.seq_len // layout.context)  # that a device computes
    # the local model: sizes divided by tensor parallelism, activations by one forward pass
    with fake_tensors(matmul_dtype if gathers and matmul_dtype else weight_dtype):
        local_model = build_full_model(config, objective, local_model_config(model_config, layout))
        if gathers:
            keep_exact(local_model)
        head = local_model.lm_head
        share = model_share(
            config,
            local_model,
            weight_bytes=weight_dtype.itemsize,
            compute_bytes=(matmul_dtype or weight_dtype).itemsize,
            expert_devices=layout.experts,
        )
        recomputed = recomputed_share(config, local_model)
        activations = stored_activation_bytes(config, local_model, work, matmul_dtype, layout)
    loss = planning.loss_bytes(
        tokens=own_tokens,
        vocab_size=0 if head is None else local_model.config.vocab_size,
        n_embd=model_config.n_embd,
        compute_bytes=share.compute_bytes,
        chunk_bytes=CHUNK_BYTES if config.plan.gpu == "cpu" else GPU_CHUNK_BYTES,
        head_learns=head is not None and head.weight.requires_grad,
    )
    # a pipeline is as full as its fullest stage
    if layout.stages > 1:
        share, memory = costliest_stage(model, share, layout, activations=activations, loss=loss)
    else:
        kept, recomputed_bytes = activations
        memory = planning.memory(share, layout, activations=kept, recomputed=recomputed_bytes, loss=loss)
    reference = memory.weights if work.reference else 0.0
    critic = critic_bytes(config, work, layout) if config.objective.get("critic") else 0.0
    memory = replace(memory, reference=reference, critic=critic)
    kept = dict.fromkeys(kept_in_ram(config), 0.0)
    in_ram, memory = sum(getattr(memory, part) for part in kept), replace(memory, **kept)
    # traffic, arithmetic and time
    sizes = {"tokens": own_tokens, "n_layer": len(model.blocks), "n_embd": model_config.n_embd}
    sizes["kv_width"] = 2 * local_model.config.n_kv_head * model_config.head_dim
    sizes["expert_rows"] = len(model_config.mixture_layers) * model_config.experts_per_token
    traffic = planning.traffic(share, layout, **sizes, passes=work.passes, recomputed=recomputed)
    tokens = work.rows * work.seq_len * work.passes * layout.data
    # a forward pass is a third of the work where every weight learns
    unlearned = work.unlearned * flops_per_token(model, model_config, work.seq_len) / 3
    flops = (
        (training_flops(model, model_config, work.seq_len, recomputed=recomputed) + unlearned) * tokens / layout.devices
    )
    machine = plan_machine(config, layout)
    time = planning.step_time(machine, layout, traffic, flops=flops)
    return StepEstimate(machine, layout, memory, traffic, time, tokens, in_ram)


def model_share(
    config: DictConfig, local_model: Model, *, weight_bytes: int, compute_bytes: int, expert_devices: int = 1
) -> planning.Share:
    """Parameters of one device: all, trained, those of experts, the largest gathered block, and optimizer moments."""
    return planning.Share(
        weights=n_parameters(local_model),
        trained=n_parameters(local_model, trainable=True),
        largest=largest_part(local_model, experts=expert_devices),
        **quantized_weights(local_model)._asdict(),
        experts=expert_parameters(local_model),
        trained_experts=expert_parameters(local_model, trainable=True),
        largest_gradient=largest_gradient(local_model) if config.trainer.optimizer_in_backward else None,
        weight_bytes=weight_bytes,
        compute_bytes=compute_bytes,
        moments=moments(
            config.optimizer._target_.rpartition(".")[2],
            local_model,
            config.optimizer.get("moments"),
            weight_bytes=weight_bytes,
        ),
    )


def recomputed_share(config: DictConfig, local_model: Model) -> float:
    """Share of blocks whose forward pass runs again in backward (trainer.recompute=full), 0 to 1."""
    every, kind = _recompute_options(config)
    return n_recomputed(local_model, every) / len(local_model.blocks) if every and kind == "full" else 0.0


def _recompute_options(config: DictConfig) -> tuple[int | None, str]:
    """Every how many blocks are recomputed, None for none, and which way: "full" or "selective"."""
    options = config.trainer
    every = options.recompute_every if options.recompute is None else options.recompute_every or 1
    return every, options.recompute or "full"


def stored_activation_bytes(
    config: DictConfig, local_model: Model, work: DeviceWork, matmul_dtype: torch.dtype | None, layout: planning.Layout
) -> Activations:
    """Bytes that a forward pass of a batch stores for its backward pass."""
    every, kind = _recompute_options(config)
    return activation_bytes(
        local_model,
        rows=work.rows,
        seq_len=work.seq_len,
        product=matmul_dtype,
        every=every,
        kind=kind,
        fused=config.plan.gpu != "cpu",
        sequence_shards=layout.tensor if layout.sequence else 1,
        context=layout.context,
    )


def critic_bytes(config: DictConfig, work: DeviceWork, layout: planning.Layout) -> float:
    """Bytes of PPO's critic, which is trained beside the policy."""
    model_config, _ = read_stored_config(config.objective.critic, option="objective.critic")
    weight_dtype, matmul_dtype = DTYPES.get(config.precision.lightning, (torch.float32, torch.bfloat16))
    with fake_tensors(weight_dtype):
        critic = build_model(model_config)
        critic.set_head(Head.none)
        sizes = {"weight_bytes": weight_dtype.itemsize, "compute_bytes": (matmul_dtype or weight_dtype).itemsize}
        share = model_share(config, critic, **sizes)
        activations = stored_activation_bytes(config, critic, work, matmul_dtype, layout)
    return planning.memory(share, layout, activations=sum(activations), loss=0.0).total


def costliest_stage(
    model: Model, share: planning.Share, layout: planning.Layout, *, activations: Activations, loss: float
) -> tuple[planning.Share, planning.Memory]:
    """Share and memory of the pipeline stage that needs most: the first holds the embeddings, the last the head
    and its loss.
    """
    stages = []
    for stage, (weights, trained) in enumerate(stage_sizes(model, layout.stages, layout.loops)):
        stage_share = replace(share, weights=weights, trained=trained)
        stage_loss = loss if stage == layout.stages - 1 else 0.0
        sizes = {"activations": activations.kept, "recomputed": activations.recomputed, "loss": stage_loss}
        stages.append((stage_share, planning.memory(stage_share, layout, **sizes, stage=stage)))
    return max(stages, key=lambda stage: stage[1].total)


def describe_estimate(estimate: StepEstimate, steps: int | None) -> list[str]:
    """Lines of the tables. steps: of the run, None where its length is counted in passes."""
    memory, time, machine, layout = estimate.memory, estimate.time, estimate.machine, estimate.layout
    parts = [field.name for field in fields(memory)]
    lines = ["memory      per device, estimated"]
    lines += [f"  {part:<12}{format_bytes(getattr(memory, part)):>10}" for part in parts if getattr(memory, part)]
    fits = "fits in" if memory.total < 0.95 * machine.memory else "DOES NOT FIT in"
    lines.append(
        f"  {'total':<12}{format_bytes(memory.total):>10}  {fits} the {format_bytes(machine.memory)} of {machine.name}"
    )
    if estimate.in_ram:
        lines.append(f"  {'in RAM':<12}{format_bytes(estimate.in_ram):>10}  beside it, of each process")
    if estimate.traffic:
        shape = {
            "data": layout.data // layout.experts,
            "experts": layout.experts,
            "context": layout.context,
            "tensor": layout.tensor,
            "stages": layout.stages,
        }
        on = " x ".join(f"{n} ({name})" for name, n in shape.items() if n > 1)
        lines.append(f"traffic     per device and step, on {on} devices")
        lines += [
            f"  {t.what:<28}{format_bytes(t.n_bytes):>10}  among {t.group}{', across nodes' if t.across_nodes else ''}"
            for t in estimate.traffic
        ]
    # time, and what limits it
    rate = estimate.tokens / time.step
    lines += [
        f"time        per step, on {machine.name} at {machine.efficiency:.0%} of {machine.flops / 1e12:.4g} TFLOP/s",
        f"  {'computing':<28}{time.compute:>9.3g}s",
    ]
    if estimate.traffic:
        lines.append(f"  {'communication':<28}{time.communication:>9.3g}s")
    lines.append(f"  {'step':<28}{time.step:>9.3g}s  bottleneck: {time.bottleneck}")
    whole = f"; {steps:,} steps in {duration(steps * time.step)}" if steps else ""
    return [*lines, f"rate        {rate:,.0f} tokens per second, {rate / layout.devices:,.0f} per device{whole}"]
