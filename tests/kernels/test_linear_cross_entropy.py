import pytest
import torch
import torch.nn.functional as F
from largest_tensor import LargestTensor
from torch import Tensor

from genai_pl.kernels import GroupSums, linear_cross_entropy
from genai_pl.kernels.chunked_logits import tokens_at_once
from genai_pl.kernels.cross_entropy import repeatable_backward

N, C, V = 23, 8, 37


def inputs(*, ignored: float = 0.3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (N, C), weight (V, C), bias (V,), all leaves that need gradients, and labels (N,)."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((N, C), (V, C), (V,))
    )
    labels = torch.randint(V, (N,), generator=generator)
    return hidden, weight, bias, labels.masked_fill(torch.rand(N, generator=generator) < ignored, -100)


def full_logits(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    return loss + z_loss * logits.logsumexp(-1)[labels != -100].square().sum()


def assert_same(ours: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, expected)
    # a gradient from above that is not 1, as after dividing by the number of tokens
    torch.testing.assert_close(
        torch.autograd.grad(ours / 7, leaves), torch.autograd.grad(expected / 7, leaves, allow_unused=True)
    )


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradients_are_those_of_full_logits(with_bias, softcap, label_smoothing, z_loss):
    hidden, weight, bias, labels = inputs()
    options = {"softcap": softcap, "label_smoothing": label_smoothing, "z_loss": z_loss}
    options["bias"] = bias if with_bias else None
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    for chunk_tokens in (None, 4):
        ours = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens, **options)
        assert_same(ours, full_logits(hidden, weight, labels, **options), leaves)


@pytest.mark.parametrize("chunk_tokens", [None, 5])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_sums_by_group_are_those_of_its_tokens_and_change_no_loss(chunk_tokens: int | None, ignored: float) -> None:
    hidden, weight, _, labels = inputs(ignored=ignored)
    groups = torch.arange(N) % 3
    by_group = GroupSums(groups, torch.zeros(4, dtype=torch.float64))
    ours = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens, by_group=by_group)
    assert_same(ours, full_logits(hidden, weight, labels), [hidden, weight])
    expected = [full_logits(hidden, weight, labels.masked_fill(groups != k, -100)) for k in range(4)]
    torch.testing.assert_close(by_group.sums, torch.stack(expected).detach())


@pytest.mark.parametrize("chunk_tokens", [1, 2, N - 1, N, N + 1, 1000])
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_the_chunk_size_changes_nothing(chunk_tokens: int, ignored: float):
    hidden, weight, _, labels = inputs(ignored=ignored)
    ours = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
    assert_same(ours, full_logits(hidden, weight, labels), [hidden, weight])


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 204), ("cuda", 1046)])
def test_a_gpu_takes_larger_chunks_of_a_vocabulary_of_128k(device: str, tokens: int):
    assert tokens_at_once(128256, torch.device(device)) == tokens
    assert tokens_at_once(10**9, torch.device(device)) == 1


def test_batches_of_sequences_and_another_ignore_index_are_taken():
    hidden, weight, _, labels = inputs()
    ours = linear_cross_entropy(
        hidden.view(1, N, C), weight, labels.masked_fill(labels == -100, -1).view(1, N), ignore_index=-1
    )
    assert_same(ours, full_logits(hidden, weight, labels), [hidden, weight])


def test_nothing_but_ignored_labels_gives_zero_and_zero_gradients():
    hidden, weight, bias, labels = inputs(ignored=1.1)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, z_loss=0.1, label_smoothing=0.1)
    assert loss.item() == 0.0
    for leaf, gradient in zip((hidden, weight, bias), torch.autograd.grad(loss, (hidden, weight, bias)), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_an_input_that_needs_no_gradient_gets_none_and_the_others_are_right(frozen: str):
    hidden, weight, bias, labels = inputs()
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves.pop(frozen).requires_grad_(False)
    ours = linear_cross_entropy(hidden, weight, labels, bias=bias, softcap=2.0)
    assert_same(ours, full_logits(hidden, weight, labels, bias=bias, softcap=2.0), list(leaves.values()))


def test_gradients_add_up_over_micro_batches():
    hidden, weight, _, labels = inputs()
    for part in (slice(0, 9), slice(9, N)):
        (linear_cross_entropy(hidden[part], weight, labels[part]) / 5).backward()
    expected = torch.autograd.grad(full_logits(hidden, weight, labels) / 5, (hidden, weight))
    torch.testing.assert_close((hidden.grad, weight.grad), expected)


def test_a_second_backward_is_refused_and_leaves_the_first_gradients_alone():
    hidden, weight, _, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss / 3, (hidden, weight), retain_graph=True)
    with pytest.raises(RuntimeError, match="gives its gradients once"):
        loss.backward()
    torch.testing.assert_close(first, torch.autograd.grad(full_logits(hidden, weight, labels) / 3, (hidden, weight)))


def test_a_gradient_of_the_gradient_is_refused():
    hidden, weight, _, labels = inputs()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = scale * linear_cross_entropy(hidden, weight, labels)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_errs_at_most_twice_as_much_as_eager_bf16(autocast: bool):
    dtype = torch.float32 if autocast else torch.bfloat16
    hidden, weight, bias, labels = inputs(dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    truth = full_logits(*exact[:2], labels, bias=exact[2], softcap=5.0)
    results = [truth, *torch.autograd.grad(truth, exact)]
    errors = []
    for function in (linear_cross_entropy, full_logits):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = function(hidden, weight, labels, bias=bias, softcap=5.0)
        gradients = torch.autograd.grad(loss, (hidden, weight, bias))
        assert [x.dtype for x in gradients] == [dtype] * 3
        errors.append([(a - b).abs().max() for a, b in zip((loss, *gradients), results, strict=True)])
    for ours, eager in zip(*errors, strict=True):
        assert ours <= 2 * eager


def test_gradients_of_a_bf16_weight_are_summed_in_float32():
    hidden = torch.ones(2000, C, dtype=torch.bfloat16)
    weight = torch.zeros(2, C, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(2000, dtype=torch.long), chunk_tokens=1).backward()
    # bf16 stands still at 128: there 0.5 more is less than half a step
    assert torch.equal(weight.grad, torch.tensor([[-1000.0], [1000.0]]).bfloat16().expand(2, C))


def test_autocast_leaves_float64_alone():
    hidden, weight, _, labels = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, labels)
    assert_same(ours, full_logits(hidden, weight, labels), [hidden, weight])


def test_the_loss_of_bf16_inputs_is_float32():
    hidden, weight, _, labels = inputs(dtype=torch.bfloat16)
    assert linear_cross_entropy(hidden, weight, labels).dtype == torch.float32


def test_logits_of_a_million_do_not_overflow():
    hidden, weight, _, labels = inputs(dtype=torch.float32)
    loss = linear_cross_entropy(1e6 * hidden, weight, labels)
    torch.testing.assert_close(loss, full_logits(1e6 * hidden, weight, labels))
    assert torch.autograd.grad(loss, weight)[0].isfinite().all()


def test_the_logits_of_all_tokens_never_exist_at_once():
    hidden, weight = torch.randn(300, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    labels = torch.randint(V, (300,))
    with LargestTensor() as ours:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=16, softcap=9.0, label_smoothing=0.1).backward()
    assert ours.numel == 300 * C  # the gradient of hidden
    with LargestTensor() as full:
        full_logits(hidden, weight, labels).backward()
    assert full.numel == 300 * V


def test_evaluation_makes_no_gradients():
    hidden, weight, _, labels = inputs()
    with LargestTensor() as evaluation, torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=4)
    assert evaluation.numel < min(N * C, V * C)
    torch.testing.assert_close(loss, full_logits(hidden, weight, labels).detach())


def test_a_frozen_weight_costs_no_memory_of_its_size():
    hidden, weight, _, labels = inputs()
    with LargestTensor() as frozen:
        linear_cross_entropy(hidden, weight.detach(), labels, chunk_tokens=4).backward()
    assert frozen.numel < V * C


def test_backward_hands_out_the_gradients_without_a_copy():
    hidden, weight, _, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, labels)
    with LargestTensor() as backward:
        (loss / 3).backward()
    assert backward.numel <= 1


# dynamo silences this warning of its own by a way that errors get past
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_step_calls_it_between_its_graphs():
    hidden, weight, _, labels = inputs()

    def step(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(hidden * 2, weight, labels) / N

    ours = torch.compile(step, backend="aot_eager")(hidden)
    assert_same(ours, full_logits(hidden * 2, weight, labels) / N, [hidden, weight])


def test_a_repeatable_backward_gives_the_gradients_of_inputs_and_then_of_weights() -> None:
    hidden, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    labels = torch.tensor([1, 2, -100, 6, 0])
    with repeatable_backward():
        loss = linear_cross_entropy(hidden, weight, labels)
    (first,) = torch.autograd.grad(loss, hidden, torch.tensor(2.0, dtype=torch.float64), retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight, torch.tensor(2.0, dtype=torch.float64))
    (2 * F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")).backward()
    torch.testing.assert_close(first, hidden.grad)
    torch.testing.assert_close(second, weight.grad)
