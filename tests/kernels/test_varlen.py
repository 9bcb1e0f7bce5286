"""Attention of packed rows by torch's varlen_attn, whose kernel is written out here: it runs on GPUs only."""

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.kernels import AttentionMask, ScoreOptions, attention
from genai_pl.kernels.reference import reference_attention
from genai_pl.kernels.varlen import documents, varlen_attention, varlen_unsupported

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 0, 0], [0, 3, 3, 3, 3, 3, 1]])


def by_documents(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, q_longest: int, k_longest: int, **options
) -> Tensor:
    """varlen_attn as torch documents it: one call of SDPA for each document; window_size=(left, right), -1 without end."""
    left, right = options.pop("window_size")
    assert q_starts.dtype == torch.int32
    assert q_longest == k_longest == int(q_starts.diff().max())
    parts = []
    for start, end in zip(q_starts[:-1].tolist(), k_starts[1:].tolist(), strict=True):
        n = torch.arange(end - start)
        distance = n[:, None] - n
        visible = (distance <= (left if left >= 0 else end)) & (-distance <= (right if right >= 0 else end))
        rows = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        y = F.scaled_dot_product_attention(*rows, attn_mask=visible, **options)
        parts.append(y[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("rules", [{}, {"causal": True}, {"window": 2}, {"causal": True, "window": 3}], ids=str)
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "packed"])
def test_documents_laid_end_to_end_give_the_reference_and_its_gradients(rules, segments, monkeypatch):
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", by_documents)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, heads, 7, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4)]
    mask = AttentionMask(**rules, segments=segments)

    def results(attend) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in drawn[:3]]
        y = attend(*leaves)
        return [y, *torch.autograd.grad(y, leaves, drawn[3])]

    expected = results(lambda q, k, v: reference_attention(q, k, v, mask, scale=0.3))
    ours = results(lambda q, k, v: varlen_attention(q, k, v, mask, ScoreOptions(scale=0.3)))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"head_dim": 20}, "not 20"),
        ({"lengths": (1, 7)}, "whole rows only"),
        ({"mask": AttentionMask(causal=True, prefix=2)}, "whole rows only"),
        ({"mask": AttentionMask(segments=SEGMENTS, global_prefix=2)}, "whole rows only"),
        ({"mask": AttentionMask(segments=torch.tensor([[1, 2, 1, 0]])), "lengths": (4, 4)}, "gaps"),
        ({"options": ScoreOptions(dropout_p=0.1)}, "dropout"),
        ({"options": ScoreOptions(softcap=3.0)}, "softcap"),
    ],
)
def test_what_it_cannot_compute_has_a_reason(changes: dict, words: str, monkeypatch):
    given = {"head_dim": 64, "dtype": torch.bfloat16, "lengths": (7, 7)}
    given |= {"mask": AttentionMask(causal=True), "options": ScoreOptions()}
    if "gaps" in words:  # a mask's tensors are on its device: this one is on the CPU
        monkeypatch.setattr("genai_pl.kernels.varlen.documents", lambda mask, B, T, _: documents(mask, B, T, CPU))
    assert varlen_unsupported(CUDA, **given) is None
    assert words in varlen_unsupported(CUDA, **(given | changes))


def test_padding_may_come_in_several_runs_and_documents_may_not():
    assert documents(AttentionMask(segments=torch.tensor([[0, 1, 1, 0, 2, 0]])), 1, 6, CPU) is not None
    assert documents(AttentionMask(segments=torch.tensor([[2, 1, 2, 0]])), 1, 4, CPU) is None


def test_on_a_cpu_it_is_refused_in_one_line():
    x = torch.zeros(1, 1, 2, 8)
    with pytest.raises(
        ConfigError, match=r"model.attention=varlen cannot run this model: varlen_attn needs a GPU, not cpu"
    ):
        attention(x, x, x, backend="varlen")
