"""The loss and the accuracy of labelled tokens against PyTorch's on full logits."""

import pytest
import torch
import torch.nn.functional as F

from genai_pl.kernels import chunked_logits as projection
from genai_pl.objectives import IGNORED, masked_accuracy, token_loss


def example(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden, head, bias = torch.randn(3, 20, 16), torch.randn(50, 16), torch.randn(50)
    labels = torch.randint(0, 50, (3, 20))
    best = (hidden @ head.t() + bias).argmax(-1)
    labels[:, ::3] = best[:, ::3]  # else hardly any would be right
    labels[:, 10:14] = IGNORED
    return hidden.to(dtype), head.to(dtype), bias.to(dtype), labels


def test_the_loss_is_the_sum_of_torchs_cross_entropy_with_bias_and_softcap() -> None:
    hidden, head, bias, labels = example()
    logits = 30 * torch.tanh((hidden @ head.t() + bias) / 30)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(token_loss(hidden, head, labels, bias=bias, softcap=30.0), expected)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk_bytes", [100 * 2**20, 4 * 50 * 7])  # all at once, or 7 tokens at a time
def test_accuracy_counts_the_labels_that_have_the_highest_logit(
    monkeypatch: pytest.MonkeyPatch, with_bias: bool, chunk_bytes: int
) -> None:
    monkeypatch.setattr(projection, "CHUNK_BYTES", chunk_bytes)
    hidden, head, bias, labels = example()
    logits = hidden @ head.t() + (bias if with_bias else 0)
    expected = ((logits.argmax(-1) == labels) & (labels != IGNORED)).sum()
    ours = masked_accuracy(hidden, head, labels, bias=bias if with_bias else None)
    assert ours == expected
    assert 0 < ours < (labels != IGNORED).sum()


def test_accuracy_without_labels_is_zero_and_needs_no_gradient() -> None:
    hidden, head, _, labels = example()
    assert masked_accuracy(hidden.requires_grad_(), head, torch.full_like(labels, IGNORED)) == 0
    assert not masked_accuracy(hidden, head, labels).requires_grad


def test_accuracy_under_autocast_multiplies_in_the_dtype_of_a_linear_layer() -> None:
    hidden, head, bias, labels = example()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = ((F.linear(hidden, head).float() + bias).argmax(-1) == labels).sum()
        assert masked_accuracy(hidden, head, labels, bias=bias) == expected
