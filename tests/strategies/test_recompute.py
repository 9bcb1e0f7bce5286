"""Recomputed blocks: the same results, and no activations kept between input and output."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from genai_pl.config.enums import Shape
from genai_pl.models import ModelConfig, build_model
from genai_pl.strategies import recompute

SEGMENTS = torch.tensor([[1] * 9 + [2] * 7 + [0] * 4, [1] * 20])


def gradients(
    every: int | None, *, kind: str = "full", compiled: bool = False, **options: object
) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    sizes = {"n_layer": 4, "n_head": 2, "n_embd": 16, "vocab_size": 50, "max_seq_len": 20}
    model = build_model(ModelConfig(**sizes, **options))
    if compiled:
        for block in model.blocks:
            block.compile(backend="aot_eager")
    if every is not None:
        recompute(model, every, kind=kind)
    ids = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(1))
    logits = model(ids, SEGMENTS)
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    "options", [{"dropout": 0.2}, {"share_layers": True, "shape": Shape.encoder}], ids=["dropout", "shared"]
)
def test_recomputed_packed_rows_give_the_same_gradients(every: int, kind: str, options: dict) -> None:
    (logits, expected), (actual, again) = gradients(None, **options), gradients(every, kind=kind, **options)
    assert torch.equal(actual, logits)
    for a, b in zip(again, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_a_compiled_block_can_run_twice(kind: str) -> None:
    (logits, expected), (actual, again) = gradients(None), gradients(1, kind=kind, compiled=True)
    torch.testing.assert_close(actual, logits)
    for a, b in zip(again, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_recomputed_block_keeps_its_input_only() -> None:
    kept = {}
    for every in (None, 1):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            gradients(every)
        kept[every] = sum(sizes)
    assert kept[1] < 0.5 * kept[None]


def test_selective_recomputation_multiplies_no_matrix_twice() -> None:
    counts = {}
    for kind in (None, "full", "selective"):
        with FlopCounterMode(display=False) as counter:
            gradients(None if kind is None else 1, kind=kind or "full")
        counts[kind] = counter.get_total_flops()
    assert counts["selective"] == counts[None] < counts["full"]
