"""Expert parallelism: each rank of a group holds some experts, and tokens travel to them and back (Lepikhin et al. 2020).

Ranks of a group read different batches, as under data parallelism, and hold E / size experts each. A mixture layer sends
every row, sorted by expert, to the rank of its expert, which multiplies all the rows that it was sent, and returns them:
two exchanges forward, two backward. No row is dropped, so a layer computes what it computes on one process, whatever the
load. A rank's gradient of an expert is thereby the sum over its group. Models know nothing of it: `forward` of their
experts is replaced, and parameters become DTensors, so checkpoints see full shapes.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from genai_pl.distributed.tensor_parallel_group import exchange_rows
from genai_pl.errors import ConfigError
from genai_pl.kernels.uncompiled import uncompiled
from genai_pl.models.experts import Dispatch, ExpertLinear, Experts, SortRows, sort_by_expert
from genai_pl.peft.lora import LoRALinear

Compute = Callable[[Tensor, Dispatch], Tensor]


def expert_mesh(device: str, *, data: int, replicate: int, size: int) -> DeviceMesh:
    """The mesh (expert_replicate, expert_data, expert_parallel) of `data` ranks, for the parameters of experts.

    replicate: copies of everything else. A copy's ranks hold the experts once if they are enough for a group of `size`,
    and shard what each rank of a group holds if they are more; if they are fewer, several copies hold the experts once.
    """
    ranks = max(data // replicate, size)
    names = ("expert_replicate", "expert_data", "expert_parallel")
    return init_device_mesh(device, (data // ranks, ranks // size, size), mesh_dim_names=names)


def split_experts(model: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, **options: object) -> None:
    """Divide the experts of a model, in place: along `expert_parallel` by number, along `expert_data` with FSDP2.

    mesh: of `expert_mesh`. policy, options: of `fully_shard`
    """
    group = mesh["expert_parallel"].get_group()
    copies, shards = mesh["expert_replicate"].size(), mesh["expert_data"].size()
    for experts in _experts(model):
        for layer in experts.modules():
            for name, parameter in list(layer.named_parameters(recurse=False)):
                shard = distribute_tensor(parameter.detach(), mesh["expert_parallel"], [Shard(0)])
                setattr(layer, name, nn.Parameter(shard, requires_grad=parameter.requires_grad))
        experts.forward = partial(_exchanged, experts.forward, group)
        # the first dimension may have fewer experts than there are shards
        fully_shard(
            experts,
            mesh=mesh["expert_replicate", "expert_data"] if copies > 1 else mesh["expert_data"],
            shard_placement_fn=lambda parameter: Shard(_even_dim(parameter, shards)),
            mp_policy=policy,
            **options,
        )
        # a gradient is a sum over the group already, and becomes the mean over all ranks, as every other
        experts.set_gradient_divide_factor(float(mesh.size()))
        if shards > 1:  # gloo has no other reduction with a factor; of one shard, torch would divide twice
            experts.set_force_sum_reduction_for_comms(True)


@uncompiled("the host reads how many rows each rank gets")
def _exchanged(compute: Compute, group: dist.ProcessGroup, x: Tensor, dispatch: Dispatch) -> Tensor:
    """The experts' outputs for rows sorted by expert, (N k, C) -> (N k, C), each computed by the rank of its expert.

    compute: this rank's experts, as a function of rows and their dispatch
    """
    # how many rows go where: (size, experts of a rank), of this rank and for this rank
    sent = dispatch.ends.diff(prepend=dispatch.ends.new_zeros(1)).view(group.size(), -1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent.contiguous(), group=group)
    n_sent, n_received = sent.sum(1).tolist(), received.sum(1).tolist()
    rows = exchange_rows(x, sent=n_sent, received=n_received, group=group)
    # rows came by rank, and by expert within it; experts see them in the order of one process that had all batches
    own = torch.arange(received.shape[1], device=x.device).repeat(group.size())
    own = own.repeat_interleave(received.flatten(), output_size=len(rows))
    local = sort_by_expert(own[:, None], received.shape[1], tokens_per_row=dispatch.tokens_per_row)
    y = compute(SortRows.apply(rows, local.order, local.inverse, 1), local)
    y = SortRows.apply(y, local.inverse, local.order, 1)
    return exchange_rows(y, sent=n_received, received=n_sent, group=group)


def check_experts(model: nn.Module, *, data: int, replicate: int, size: int) -> None:
    """ConfigError that names what cannot be divided among `size` ranks, of `data` that see different batches."""
    option, found = f"strategy.expert_parallel_size ({size})", _experts(model)
    if not found:
        raise ConfigError(f"{option}: the model has no experts of our own; set model.n_experts, or leave it at 1")
    n_experts, shared_by = model.config.n_experts, data // replicate
    if size < 1 or n_experts % size:
        raise ConfigError(f"model.n_experts ({n_experts}) must be divisible by {option}")
    if data % size or max(shared_by, size) % min(shared_by, size):
        raise ConfigError(
            f"{option} must divide strategy.data_parallel_size ({data}), and divide or be a multiple of "
            f"data_parallel_size / replicate_size ({shared_by})"
        )
    layers = [layer for experts in found for layer in (experts.gate_proj, experts.up_proj, experts.down_proj) if layer]
    if not all(type(layer) is ExpertLinear or _is_plain_lora(layer) for layer in layers):
        raise ConfigError(f"{option}: of adapters on experts only peft=lora, without DoRA and PiSSA")
    shards = max(shared_by, size) // size
    for parameter in (parameter for experts in found for parameter in experts.parameters()):
        if _even_dim(parameter, shards) == parameter.ndim:
            raise ConfigError(
                f"model.expert_size, model.n_embd or peft.rank must be divisible by {shards} processes, each of which "
                f"holds a shard of the same experts under {option}"
            )


def _experts(model: nn.Module) -> list[Experts]:
    """The experts of each mixture layer of a model."""
    return [module for module in model.modules() if isinstance(module, Experts)]


def _is_plain_lora(layer: nn.Module) -> bool:
    """Whether a layer is LoRA on a tensor of experts, without DoRA and PiSSA."""
    if not isinstance(layer, LoRALinear) or type(layer.base) is not ExpertLinear:
        return False
    return layer.magnitude is None and layer.start_A is None


def _even_dim(parameter: Tensor, shards: int) -> int:
    """The first dimension behind that of experts that `shards` divides; the number of dimensions where none is."""
    return next((dim for dim in range(1, parameter.ndim) if parameter.shape[dim] % shards == 0), parameter.ndim)
