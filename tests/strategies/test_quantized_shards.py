"""Quantized weights under FSDP2: ranks hold rows of the codes, gather exactly the whole, and take what was planned."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from genai_pl.distributed.dtensor import local_shard
from genai_pl.models import ModelConfig, build_model
from genai_pl.peft import lora
from genai_pl.peft.quantize import QuantizedLinear
from genai_pl.planning.cost_model import Layout, Share, memory
from genai_pl.planning.count import quantized_weights
from genai_pl.strategies import ShardedStrategy
from genai_pl.strategies.quantized_shards import QuantizedShard, prepare_shards
from tests.small_models import LLAMA


@contextmanager
def ranks(size: int, rank: int) -> Iterator[None]:
    """A process group of which this process is one rank, and the others do nothing."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    yield
    dist.destroy_process_group()


def layer(kind: str, rows: int, width: int = 128) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(QuantizedLinear(nn.Linear(width, rows), kind))


def shards(kind: str, rows: int, size: int) -> list[QuantizedShard]:
    """The shards of one weight on each of some ranks."""
    found = []
    for rank in range(size):
        with ranks(size, rank):
            model = layer(kind, rows)
            assert prepare_shards(model, size) == []
            fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
            found.append(local_shard(model[0].weight).detach())
    return found


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(("rows", "size"), [(192, 2), (64, 3), (5, 4)])  # even; a short last shard; an empty one
def test_ranks_hold_consecutive_rows_and_what_they_gather_is_the_weight(kind: str, rows: int, size: int) -> None:
    whole, found = layer(kind, rows)[0].weight, shards(kind, rows, size)
    assert torch.equal(torch.cat([shard.dense() for shard in found]), whole.dense())
    gathers = [shard.fsdp_pre_all_gather(None)[0] for shard in found]
    assert len({tuple(part.shape for part in parts) for parts in gathers}) == 1  # a collective needs equal sizes
    gathered = tuple(torch.cat(parts) for parts in zip(*gathers, strict=True))
    padded, extra = found[0].fsdp_post_all_gather(gathered, None, torch.bfloat16)
    result = torch.as_strided(padded, whole.size(), whole.stride())
    assert extra == ()
    assert torch.equal(result.codes, whole.codes)
    assert torch.equal(result.scales, whole.scales)
    assert result.dtype is torch.float32
    # FSDP2 frees the memory after a pass and gathers into it again: the weight must lie nowhere else
    assert result.codes.untyped_storage().data_ptr() == gathered[0].untyped_storage().data_ptr()


def test_a_shard_that_is_moved_stays_one() -> None:
    shard = shards("nf4", 5, 4)[2]
    moved = copy.deepcopy(shard).to(torch.bfloat16).to("meta")
    assert isinstance(moved, QuantizedShard)
    assert moved.codes.shape == shard.codes.shape
    assert (moved.shape, moved.dtype, moved.is_meta) == (torch.Size((1, 128)), torch.bfloat16, True)


def test_blocks_that_cross_rows_and_single_ranks_keep_the_weight_whole() -> None:
    for width, size in ((48, 2), (64, 1)):
        model = layer("nf4", 4, width)
        weight = model[0].weight
        assert prepare_shards(model, size)[0] is weight


@pytest.mark.parametrize(("kind", "bytes_each"), [("nf4", 36 / 64), ("int8", 1 + 4 / 64)])
def test_a_rank_holds_its_share_of_the_codes_as_planned(kind: str, bytes_each: float) -> None:
    config = ModelConfig.from_dict({**LLAMA, "n_embd": 64, "intermediate_size": 128, "n_head": 4, "n_kv_head": 2})
    model = lora(build_model(config), quantize=kind)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    n, codes = sum(layer.weight.numel() for layer in layers), quantized_weights(model)
    with ranks(4, 1):
        strategy = ShardedStrategy()
        strategy.precision_plugin = type("Precision", (), {"precision": "32-true"})
        strategy._shard(model, init_device_mesh("cpu", (4,)))
    held = [local_shard(layer.weight) for layer in layers]
    n_bytes = sum(part.numel() * part.element_size() for shard in held for part in (shard.codes, shard.scales))
    assert n_bytes == pytest.approx(n * bytes_each / 4, rel=0.05)  # down_proj has rows of 128
    share = Share(weights=n, trained=0, largest=0, **codes._asdict())
    assert codes.quantized == n
    assert memory(share, Layout(data=4, zero=3), activations=0, loss=0).weights == pytest.approx(n_bytes)
