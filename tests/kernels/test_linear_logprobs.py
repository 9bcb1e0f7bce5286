import pytest
import torch
import torch.nn.functional as F
from largest_tensor import LargestTensor
from torch import Tensor

from genai_pl.kernels import linear_logprobs

B, T, C, V = 2, 11, 8, 37


def inputs(*, ignored: float = 0.3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (B, T, C), weight (V, C), bias (V,), all leaves that need gradients, and labels (B, T)."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((B, T, C), (V, C), (V,))
    )
    labels = torch.randint(V, (B, T), generator=generator)
    return hidden, weight, bias, labels.masked_fill(torch.rand(B, T, generator=generator) < ignored, -100)


def full_logits(hidden: Tensor, weight: Tensor, labels: Tensor, bias=None, softcap=None) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    labelled = labels != -100
    logprobs = logits.log_softmax(-1).gather(-1, labels.where(labelled, 0).unsqueeze(-1)).squeeze(-1)
    return logprobs.where(labelled, 0.0)


def weighted(logprobs: Tensor) -> Tensor:
    """A scalar in which every token has a weight of its own, as in policy gradients."""
    return (logprobs * torch.linspace(-1, 2, logprobs.numel(), dtype=logprobs.dtype).view_as(logprobs)).sum()


@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 1000])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.1])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_logprobs_and_gradients_are_those_of_full_logits(with_bias, softcap, ignored, chunk_tokens):
    hidden, weight, bias, labels = inputs(ignored=ignored)
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    bias = bias if with_bias else None
    ours = linear_logprobs(hidden, weight, labels, bias=bias, softcap=softcap, chunk_tokens=chunk_tokens)
    expected = full_logits(hidden, weight, labels, bias, softcap)
    torch.testing.assert_close(ours, expected)
    for _ in range(2):  # backward may run again: it makes its gradients anew
        torch.testing.assert_close(
            torch.autograd.grad(weighted(ours), leaves, retain_graph=True),
            torch.autograd.grad(weighted(expected), leaves, retain_graph=True),
        )


def test_an_ignored_token_has_logprob_zero_under_any_ignore_index():
    hidden, weight, _, labels = inputs()
    other = linear_logprobs(hidden, weight, labels.masked_fill(labels == -100, -1), ignore_index=-1)
    assert torch.equal(other, linear_logprobs(hidden, weight, labels))
    assert not other[labels == -100].any()


def test_a_frozen_weight_gets_no_gradient():
    hidden, weight, _, labels = inputs()
    ours = linear_logprobs(hidden, weight.detach(), labels)
    expected = full_logits(hidden, weight.detach(), labels)
    torch.testing.assert_close(
        torch.autograd.grad(weighted(ours), hidden), torch.autograd.grad(weighted(expected), hidden)
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_errs_at_most_three_times_as_much_as_eager_bf16(autocast: bool):
    dtype = torch.float32 if autocast else torch.bfloat16
    hidden, weight, _, labels = inputs(dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = full_logits(*exact, labels)
    results = [truth, *torch.autograd.grad(weighted(truth), exact)]
    errors = []
    for function in (linear_logprobs, full_logits):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logprobs = function(hidden, weight, labels)
        gradients = torch.autograd.grad(weighted(logprobs), (hidden, weight))
        assert [x.dtype for x in gradients] == [dtype] * 2
        errors.append([(a - b).abs().max() for a, b in zip((logprobs, *gradients), results, strict=True)])
    for ours, eager in zip(*errors, strict=True):
        assert ours <= 3 * eager  # torch 2.15 rounds the gradients of log_softmax half as much as 2.13


def test_the_logits_of_all_tokens_never_exist_at_once():
    hidden, weight = torch.randn(300, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    with LargestTensor() as ours:
        linear_logprobs(hidden, weight, torch.randint(V, (300,)), chunk_tokens=16).sum().backward()
    assert ours.numel == 300 * C  # the gradient of hidden
