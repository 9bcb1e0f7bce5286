"""The flash attention operator as torch sees it: compile, checkpointing, autocast, fake tensors, FLOPs."""

import sys
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

from flash import DEVICE, draw, inputs, on_device, relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from genai_pl.errors import ConfigError
from genai_pl.kernels import AttentionMask, ScoreOptions, attention, choose_backend
from genai_pl.kernels.flash.mask_tables import mask_tables
from genai_pl.kernels.flash.operator import flash_attention

SEGMENTS = torch.tensor([[1] * 9 + [2] * 8 + [0] * 3]).to(DEVICE)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
triton_attention = partial(attention, backend="triton")


def leaves(**sizes: int) -> list[Tensor]:
    return [x.float().detach().requires_grad_() for x in inputs(**{"B": 1, "T": 20, **sizes})[:3]]


def gradients(attend, tensors: list[Tensor]) -> list[Tensor]:
    o = attend(*tensors)
    return [o.detach(), *torch.autograd.grad(o.square().sum(), tensors)]


def numpy_keep(seed: int, shape: tuple[int, int, int, int], p: float) -> Tensor:
    """Philox4x32 of 7 rounds on counters (key, query, head, 0), from the paper (Salmon et al. 2011, section 3.3)."""
    B, H, T, S = shape
    low = np.uint64(0xFFFFFFFF)
    counters = np.meshgrid(*(np.arange(n, dtype=np.uint64) for n in (B * H, T, S)), indexing="ij")
    c2, c1, c0 = counters
    c3 = np.zeros_like(c0)
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    for _ in range(7):
        left, right = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & low, (left >> 32) ^ c3 ^ k1, left & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return torch.from_numpy((c0 >> np.uint64(8)).astype(np.float64) / 2**24 >= p).view(shape)


@pytest.mark.parametrize("blocks", [None, (16, 64, 4, 1)])
def test_dropout_is_philox_of_key_query_and_head_whatever_the_blocks(monkeypatch, blocks: tuple | None):
    from genai_pl.kernels.flash.config import Blocks

    if blocks is not None:
        monkeypatch.setattr("genai_pl.kernels.flash.problem.launch_config", lambda *_: Blocks(*blocks))
    p, mask = 0.3, AttentionMask(causal=True)
    tensors = inputs(H=4, T=40)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        seed = int(torch.randint(2**62, (1,), device=DEVICE))
        torch.manual_seed(5)
        ours = [x.float().requires_grad_() for x in tensors[:3]]
        o, _ = flash_attention(*ours, mask, ScoreOptions(dropout_p=p))
    d_o = tensors[3]
    ours = [o, *torch.autograd.grad(o, ours, d_o.float())]

    keep = numpy_keep(seed, (2, 4, 40, 40), p).to(DEVICE)
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    k_all, v_all = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = (q @ k_all.mT / 4).masked_fill(~mask.dense(40, 40).to(DEVICE), float("-inf"))
    o = (scores.softmax(-1) * keep / (1 - p)) @ v_all
    exact = [o, *torch.autograd.grad(o, (q, k, v), d_o)]
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(ours, exact, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck in torch 2.15
@pytest.mark.parametrize("biased", [False, True])
def test_the_operator_is_well_formed(biased: bool):
    mask = AttentionMask(causal=True, segments=SEGMENTS)
    bias = draw(1, 2, 20, 20).float().requires_grad_() if biased else None
    tables = mask_tables(mask, 20, 20, SEGMENTS.device)
    case = (True, 0, False, True, 0, 0.25, 0.0, 0.0, False)
    sinks = draw(2).float().requires_grad_() if biased else None
    extras = (bias, None, *tables, None, sinks)
    torch.library.opcheck(torch.ops.genai_pl.flash_forward.default, (*leaves(), *extras, *case))


@pytest.mark.parametrize("documents", [False, True])
def test_two_layers_compile_to_one_graph_with_the_same_result(documents: bool):
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = AttentionMask(causal=True, segments=SEGMENTS if documents else None)
        return triton_attention(triton_attention(q, k, v, mask), k, v, mask, softcap=3.0)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled, leaves()), gradients(step, leaves()))


def test_dropout_compiles_and_is_drawn_anew():
    step = torch.compile(partial(triton_attention, dropout_p=0.5), backend="aot_eager", fullgraph=True)
    q, k, v = leaves()
    assert not torch.equal(step(q, k, v), step(q, k, v))


def test_recomputing_in_a_checkpoint_drops_the_same_weights():
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return triton_attention(q, k, v, AttentionMask(causal=True, segments=SEGMENTS), dropout_p=0.4)

    def run(attend) -> list[Tensor]:
        torch.manual_seed(3)
        return gradients(attend, leaves())

    with torch.random.fork_rng():
        plain, recomputed = run(step), run(lambda *x: checkpoint(step, *x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_inputs(compiled: bool):
    attend = torch.compile(triton_attention, backend="aot_eager", fullgraph=True) if compiled else triton_attention
    tensors = leaves(T=7)
    with torch.autocast(DEVICE, torch.bfloat16):
        o = attend(*tensors)
    assert o.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(o.sum(), tensors))


def test_flop_counters_count_two_products_forward_and_five_backward():
    with FlopCounterMode(display=False) as counter:
        gradients(triton_attention, leaves(H=4, T=7))
    product = 2 * 4 * 7 * 7 * 16
    assert counter.get_total_flops() == 7 * product


def test_slopes_that_want_a_gradient_are_refused():
    with pytest.raises(ValueError, match="alibi slopes are constants"):
        triton_attention(*leaves(), alibi=torch.ones(2, device=DEVICE, requires_grad=True))


def test_layers_that_share_a_mask_share_its_tables():
    mask = on_device(AttentionMask(causal=True, segments=SEGMENTS))
    first = mask_tables(mask, 20, 20, SEGMENTS.device)
    assert all(a is b for a, b in zip(first, mask_tables(mask, 20, 20, SEGMENTS.device), strict=True))
    assert mask_tables(AttentionMask(causal=True, window=3), 20, 20, SEGMENTS.device) == (None, None)


def test_auto_picks_triton_on_a_gpu_where_it_can():
    assert choose_backend(CUDA, options=ScoreOptions(softcap=30.0), dtype=torch.bfloat16, head_dim=128)[0] == "triton"
    assert choose_backend(CPU)[0] == "sdpa"
    for lack, word in (({"head_dim": 512}, "512"), ({"dtype": torch.float64}, "float64")):
        backend, reason = choose_backend(CUDA, **lack)
        assert backend == "sdpa"
        assert word in reason


def test_without_triton_a_gpu_runs_sdpa_and_says_why(monkeypatch):
    monkeypatch.setattr(sys.modules["genai_pl.kernels.attention"], "HAS_TRITON", False)
    backend, reason = choose_backend(CUDA)
    assert backend == "sdpa"
    assert "triton is not installed" in reason
    with pytest.raises(ConfigError, match=r"model\.attention=triton .* not installed"):
        choose_backend(CUDA, backend="triton")


def test_triton_on_cpu_is_refused_in_one_line_that_says_how(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"^model\.attention=triton .* TRITON_INTERPRET=1 .* model\.attention=auto$"):
        attention(*(x.cpu() for x in inputs()[:3]), backend="triton")
