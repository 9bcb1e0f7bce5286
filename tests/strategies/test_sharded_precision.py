"""bfloat16 under FSDP is that of one process, and each process draws what it should."""

import copy
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from genai_pl.callbacks import StepCheckpoint
from genai_pl.config.enums import Norm
from genai_pl.distributed.context_group import ALONE
from genai_pl.models import ModelConfig, build_model
from genai_pl.objectives import token_loss
from genai_pl.strategies import ShardedStrategy


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*FSDP2-wrapped module")  # nothing changes what it returns
@pytest.mark.parametrize("options", [{"norm": Norm.rmsnorm, "bias": False}, {"norm": Norm.layernorm, "bias": True}])
def test_bf16_under_fsdp_rounds_what_autocast_rounds_and_nothing_else(options: dict, group: None) -> None:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 50, "max_seq_len": 20}
    model = build_model(ModelConfig(**sizes, **options))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # gains that bfloat16 cannot hold
    sharded, strategy = copy.deepcopy(model), ShardedStrategy()
    strategy.precision_plugin = MixedPrecision("bf16-mixed", "cpu")
    strategy._shard(sharded, init_device_mesh("cpu", (1,)))
    ids = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(1))
    losses = []
    for each in (model, sharded):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(token_loss(each.features(ids), each.lm_head.weight, ids))
        losses[-1].backward()
    assert torch.equal(*losses)
    for (name, expected), actual in zip(model.named_parameters(), sharded.parameters(), strict=True):
        gradient = actual.grad.full_tensor() if isinstance(actual, DTensor) else actual.grad
        torch.testing.assert_close(gradient, expected.grad, rtol=1e-2, atol=1e-2, msg=name)
        assert gradient.dtype is torch.float32


def draws(replicas: list[int]) -> list[list[float]]:
    """What processes draw that read the batches of these numbers."""
    draws = []
    for rank, replica in enumerate(replicas):
        torch.manual_seed(3)
        kwargs = {"num_replicas": len(set(replicas)), "rank": replica}
        strategy = SimpleNamespace(distributed_sampler_kwargs=kwargs)
        module = SimpleNamespace(model=SimpleNamespace(context_group=ALONE))
        trainer = SimpleNamespace(
            world_size=len(replicas), global_rank=rank, global_step=0, strategy=strategy, lightning_module=module
        )
        StepCheckpoint("checkpoints", every_n_steps=1, keep=1).on_train_start(trainer, None)
        draws.append(torch.rand(3).tolist())
    return draws


def test_dropout_differs_where_batches_do_and_is_the_same_where_they_are() -> None:
    first, second, third, fourth = draws([0, 0, 1, 1])
    assert first == second
    assert third == fourth
    assert first != third
