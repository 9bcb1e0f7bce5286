"""The Triton softmax against float64: alone, and under the two functions that use it on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton")

from flash import DEVICE

from genai_pl.kernels import chunked_logits as projection
from genai_pl.kernels import linear_cross_entropy, linear_logprobs, softmax_triton
from genai_pl.kernels.softmax_triton import Softmax, cross_entropy_

N = 5
OPTIONS = [
    {},
    {"softcap": 3.0},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 3.0, "label_smoothing": 0.2, "z_loss": 0.05},
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def labels_below(V: int, n: int = N, ignored: bool = True) -> Tensor:
    labels = torch.randint(V, (n,), generator=torch.Generator().manual_seed(1))
    labels[0], labels[-1] = 0, V - 1
    if ignored:
        labels[1] = -100
    return labels.to(DEVICE)


def exact(
    logits: Tensor, labels: Tensor, *, bias: Tensor | None = None, softcap=None, label_smoothing=0.0, z_loss=0.0
) -> Tensor:
    """The loss of each row in float64."""
    logits = logits if bias is None else logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    return loss + z_loss * torch.where(labels == -100, 0.0, logits.logsumexp(-1).square())


def with_gradient(logits: Tensor, labels: Tensor, weights: Tensor | None = None, **options) -> tuple[Tensor, Tensor]:
    logits = logits.double().requires_grad_()
    loss = exact(logits, labels, **options)
    weights = torch.ones_like(loss) if weights is None else weights
    return loss.detach(), torch.autograd.grad(loss, logits, weights)[0]


def assert_close(ours: Tensor, expected: Tensor, limit: float = 1e-6) -> None:
    assert (ours.double() - expected).abs().max() <= limit * expected.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("V", [1, 7, 1003, 4096, 9001])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_losses_and_gradients_are_those_of_float64(V: int, options: dict, with_bias: bool):
    logits, labels, weights = 4 * draw(N, V).float(), labels_below(V), draw(N, seed=2).float()
    options = options | {"bias": draw(V, seed=3).float() if with_bias else None}
    loss, gradient = with_gradient(logits, labels, weights.double(), **options)
    assert_close(cross_entropy_(logits, labels, Softmax(weights=weights, **options)), loss)
    assert_close(logits, gradient)


def test_the_vocabulary_of_gpt2_is_taken():
    logits, labels = 4 * draw(2, 50257).float(), labels_below(50257, n=2, ignored=False)
    loss, gradient = with_gradient(logits, labels, label_smoothing=0.1)
    assert_close(cross_entropy_(logits, labels, Softmax(label_smoothing=0.1)), loss)
    assert_close(logits, gradient)


def test_bf16_logits_are_read_exactly_and_their_gradient_is_rounded_once():
    logits, labels = (4 * draw(N, 1003)).bfloat16(), labels_below(1003)
    loss, gradient = with_gradient(logits, labels, softcap=5.0)
    assert_close(cross_entropy_(logits, labels, Softmax(softcap=5.0)), loss)
    assert logits.dtype == torch.bfloat16
    # half a step of bf16, and what float32 errs
    assert ((logits.double() - gradient).abs() <= 2**-8 * gradient.abs() + 1e-7).all()


def test_rows_further_apart_than_the_vocabulary_leave_the_gap_alone():
    room, labels = draw(N, 64).float(), labels_below(37)
    gap = room[:, 37:].clone()
    loss, gradient = with_gradient(room[:, :37], labels)
    assert_close(cross_entropy_(room[:, :37], labels), loss)
    assert_close(room[:, :37], gradient)
    assert torch.equal(room[:, 37:], gap)


def test_arguments_may_be_expanded_or_have_gaps():
    labels = torch.stack([labels_below(37), labels_below(5)], 1)[:, 0]
    weights, bias = draw(1, seed=2).float().expand(N), draw(2 * 37, seed=3).float()[::2]
    logits = draw(N, 37).float()
    loss, gradient = with_gradient(logits, labels, weights.double(), bias=bias)
    assert_close(cross_entropy_(logits, labels, Softmax(weights=weights, bias=bias)), loss)
    assert_close(logits, gradient)


def test_an_ignored_row_gives_zero_whatever_its_logits_and_the_index():
    logits = torch.full((2, 37), float("nan"), device=DEVICE)
    assert not cross_entropy_(logits, torch.full((2,), 5, device=DEVICE), Softmax(ignore_index=5, z_loss=0.1)).any()
    assert not logits.any()


def test_without_gradients_the_logits_stay():
    logits, labels = draw(N, 37).float(), labels_below(37)
    before = logits.clone()
    losses = cross_entropy_(logits, labels, Softmax(with_gradients=False))
    assert torch.equal(logits, before)
    assert torch.equal(losses, cross_entropy_(logits, labels))


@pytest.mark.parametrize("label", [-1, 37, 2**32])
def test_a_label_outside_the_vocabulary_gives_nan_and_reads_nothing(label: int):
    assert cross_entropy_(draw(1, 37).float(), torch.tensor([label], device=DEVICE)).isnan().all()


def test_words_that_a_bias_hides_have_no_probability_even_in_the_first_blocks():
    V = 9001
    logits, labels, bias = draw(2, V).float(), torch.tensor([8500, V - 1], device=DEVICE), torch.zeros(V, device=DEVICE)
    bias[:8400] = float("-inf")
    loss, gradient = with_gradient(logits[:, 8400:], labels - 8400)
    assert_close(cross_entropy_(logits, labels, Softmax(bias=bias)), loss)
    assert_close(logits[:, 8400:], gradient)
    assert not logits[:, :8400].any()


def test_logits_of_a_million_do_not_overflow():
    logits, labels = 1e6 * draw(N, 9001).float(), labels_below(9001)
    loss, gradient = with_gradient(logits, labels)
    assert_close(cross_entropy_(logits, labels), loss)
    assert_close(logits, gradient)


def inputs(V: int = 1003, C: int = 16, n: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (n, C), weight (V, C), bias (V,) in float64, and labels (n,), some ignored."""
    labels = labels_below(V, n)
    labels[4] = -100
    return draw(n, C), draw(V, C, seed=4), draw(V, seed=5), labels


def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, **options) -> Tensor:
    """A weighted sum, so that every token has a gradient of its own."""
    result = linear_logprobs(hidden, weight, labels, **options)
    return (result * torch.linspace(-1, 2, len(labels), device=DEVICE)).sum()


def full_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor, **options) -> Tensor:
    return exact(F.linear(hidden, weight, bias), labels, **options).sum()


def full_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor, **options) -> Tensor:
    losses = exact(F.linear(hidden, weight, bias), labels, **options)
    return (-losses * torch.linspace(-1, 2, len(labels), device=DEVICE)).sum()


def gradients(function, dtype: torch.dtype, **options) -> list[Tensor]:
    """The result and its gradients for inputs rounded to bf16, in dtype."""
    *tensors, labels = inputs()
    hidden, weight, bias = (x.bfloat16().to(dtype).requires_grad_() for x in tensors)
    result = function(hidden, weight, labels, bias=bias, **options)
    return [result, *torch.autograd.grad(result / 7, (hidden, weight, bias))]


CASES = [
    (linear_cross_entropy, full_cross_entropy, {"softcap": 5.0, "label_smoothing": 0.1, "z_loss": 0.01}),
    (logprobs, full_logprobs, {"softcap": 5.0}),
]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "FUSED_DEVICES", {"cuda", "cpu"})


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("chunk_tokens", [None, 2])
@pytest.mark.parametrize(("ours", "full", "options"), CASES, ids=["cross_entropy", "logprobs"])
def test_float32_agrees_with_full_logits_in_float64(ours, full, options, chunk_tokens: int | None):
    results = gradients(ours, torch.float32, chunk_tokens=chunk_tokens, **options)
    for a, b in zip(results, gradients(full, torch.float64, **options), strict=True):
        assert_close(a, b, 2e-6)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(("ours", "full", "options"), CASES, ids=["cross_entropy", "logprobs"])
def test_bf16_errs_at_most_twice_as_much_as_eager_bf16(ours, full, options):
    truth = gradients(full, torch.float64, **options)
    fused, eager = (gradients(function, torch.bfloat16, **options) for function in (ours, full))
    for a, b, c in zip(fused, eager, truth, strict=True):
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max()


@pytest.mark.usefixtures("fused")
def test_float64_stays_exact():
    results = gradients(linear_cross_entropy, torch.float64), gradients(full_cross_entropy, torch.float64)
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected, 1e-14)


@pytest.mark.usefixtures("fused")
def test_the_gradient_of_a_float32_bias_is_summed_in_float32_under_autocast():
    hidden, bias = torch.zeros(257, 8, device=DEVICE), torch.zeros(2, device=DEVICE, requires_grad=True)
    labels = torch.zeros(257, dtype=torch.long, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = linear_cross_entropy(hidden, torch.zeros(2, 8, device=DEVICE), labels, bias=bias)
    loss.backward()
    assert bias.grad.tolist() == [-128.5, 128.5]  # bf16 has no numbers between 128 and 129


@pytest.mark.usefixtures("fused")
def test_no_tokens_at_all_give_zero():
    hidden, weight, _, labels = inputs()
    loss = linear_cross_entropy(hidden.float(), weight.float(), labels.fill_(-100))
    assert loss.item() == 0.0


@pytest.mark.usefixtures("fused")
def test_evaluation_is_right_and_writes_no_gradient(monkeypatch: pytest.MonkeyPatch):
    writes = []

    def spy(logits: Tensor, labels: Tensor, options: Softmax) -> Tensor:
        writes.append(options.with_gradients)
        return cross_entropy_(logits, labels, options)

    monkeypatch.setattr(softmax_triton, "cross_entropy_", spy)
    hidden, weight, _, labels = inputs()
    expected = exact(hidden @ weight.t(), labels)
    hidden, weight = hidden.float(), weight.float()
    with torch.no_grad():
        assert_close(linear_cross_entropy(hidden, weight, labels), expected.sum())
        assert_close(linear_logprobs(hidden, weight, labels), -expected)
    assert writes == [False, False]
