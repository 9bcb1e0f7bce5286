"""Distillation in chunks against TRL's generalized_jsd_loss, torch's cross entropy and NumPy, values and gradients."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from genai_pl.kernels.distillation import (
    TeacherLogprobs,
    Weights,
    generalized_jsd,
    linear_distillation,
    linear_teacher,
    top_logprobs,
    universal_logit_distance,
)

torch.manual_seed(4)
N, V = 11, 17
HIDDEN, HEAD, BIAS = torch.randn(N, 6).double(), torch.randn(V, 6).double(), torch.randn(V).double()
TAUGHT, TEACHER_HEAD = 2 * torch.randn(N, 9).double(), torch.randn(V, 9).double()
LABELS = torch.randint(V, (N,)).masked_fill(torch.arange(N) % 4 == 1, -100)
KEPT = LABELS != -100
ONES = torch.ones(N).double()


@pytest.fixture(scope="module")
def jsd() -> Callable[..., torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental.gkd import GKDTrainer
    return GKDTrainer.generalized_jsd_loss


def student_logits(hidden: torch.Tensor, softcap: float | None) -> torch.Tensor:
    logits = hidden @ HEAD.t() + BIAS
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_value_and_gradients_are_trls_and_torchs(
    beta: float, temperature: float, softcap: float | None, jsd: Callable[..., torch.Tensor]
) -> None:
    weights = Weights(0.3 * ONES, 0.7 * torch.linspace(0.5, 2, N).double())
    leaves = [x.clone().requires_grad_() for x in (HIDDEN, HEAD, BIAS)]
    teacher = linear_teacher(TAUGHT, TEACHER_HEAD, temperature=temperature, softcap=5.0)
    options = {"beta": beta, "temperature": temperature, "softcap": softcap, "chunk_tokens": 3}
    loss, losses = linear_distillation(*leaves[:2], LABELS, teacher, weights, bias=leaves[2], **options)
    # the same from whole logits, one token at a time
    theirs = [x.clone().requires_grad_() for x in (HIDDEN, HEAD, BIAS)]
    logits = theirs[0] @ theirs[1].t() + theirs[2]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    taught = 5 * torch.tanh(TAUGHT @ TEACHER_HEAD.t() / 5)
    divergences = torch.stack(
        [
            jsd(logits[None, [i]], taught[None, [i]], beta=beta, temperature=temperature, reduction="sum")
            for i in range(N)
        ]
    )
    cross_entropies = F.cross_entropy(logits, LABELS, reduction="none")
    expected = weights.cross_entropy * cross_entropies + temperature**2 * weights.divergence * divergences
    torch.testing.assert_close(loss, expected[KEPT].sum())
    torch.testing.assert_close(losses, torch.stack([cross_entropies, divergences]) * KEPT)
    loss.backward()
    expected[KEPT].sum().backward()
    for ours, other in zip(leaves, theirs, strict=True):
        torch.testing.assert_close(ours.grad, other.grad)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_words_that_a_teacher_leaves_out_are_one_outcome(beta: float) -> None:
    K = 4
    logprobs = (TAUGHT @ TEACHER_HEAD.t() / 2).log_softmax(-1)
    top = top_logprobs(logprobs, K)
    np.testing.assert_allclose(top.logprobs.exp().sum(1).numpy(), 1)  # the remainder is exact

    def outcomes(x: torch.Tensor) -> torch.Tensor:
        p = x.softmax(-1)
        kept = p.gather(1, top.ids)
        return torch.cat([kept, 1 - kept.sum(1, keepdim=True)], dim=1)

    leaf, theirs = HIDDEN.clone().requires_grad_(), HIDDEN.clone().requires_grad_()
    loss, _ = linear_distillation(
        leaf, HEAD, LABELS, lambda rows: TeacherLogprobs(top.logprobs[rows], top.ids[rows]), Weights(0 * ONES, ONES),
        beta=beta, temperature=2.0, bias=BIAS, chunk_tokens=5,
    )  # fmt: skip
    p, q = outcomes(logprobs), outcomes(student_logits(theirs, None) / 2)
    m = beta * p + (1 - beta) * q
    kl = {0.0: p * (p / q).log(), 1.0: q * (q / p).log()}
    expected = kl.get(beta, beta * p * (p / m).log() + (1 - beta) * q * (q / m).log())
    expected = 4 * expected[KEPT].sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(leaf.grad, theirs.grad)


def test_of_all_words_but_one_nothing_is_lost() -> None:
    logprobs = (TAUGHT @ TEACHER_HEAD.t()).log_softmax(-1)
    top = top_logprobs(logprobs, V - 1)
    student = student_logits(HIDDEN, None).log_softmax(-1)
    rest = student.scatter(1, top.ids, -torch.inf).logsumexp(1, keepdim=True)
    coarse, _ = generalized_jsd(top.logprobs, torch.cat([student.gather(1, top.ids), rest], 1), beta=0.5)
    torch.testing.assert_close(coarse, generalized_jsd(logprobs, student, beta=0.5)[0])


def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient() -> None:
    leaf = HIDDEN.float().requires_grad_()
    teacher = linear_teacher(HIDDEN.float(), HEAD.float(), temperature=1.5)
    for beta in (0.0, 0.5, 1.0):
        weights = Weights(0 * ONES.float(), ONES.float())
        loss, losses = linear_distillation(leaf, HEAD.float(), LABELS, teacher, weights, beta=beta, temperature=1.5)
        assert loss.item() == pytest.approx(0, abs=1e-5)
        assert losses[1].min() > -1e-6
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert gradient.abs().max() < 1e-5


def test_products_in_bf16_are_as_exact_as_torchs(jsd: Callable[..., torch.Tensor]) -> None:
    hidden, head, taught, teacher_head = (x.float() for x in (HIDDEN, HEAD, TAUGHT, TEACHER_HEAD))
    with torch.autocast("cpu", torch.bfloat16):
        teacher = linear_teacher(taught, teacher_head, temperature=1.0)
        weights = Weights(0 * ONES.float(), ONES.float())
        loss, _ = linear_distillation(hidden, head, LABELS, teacher, weights, beta=0.5, temperature=1.0)
        eager = [hidden @ head.t(), taught @ teacher_head.t()]
    exact = [hidden @ head.t(), taught @ teacher_head.t()]
    found, goal = (jsd(a.float()[KEPT], b.float()[KEPT], beta=0.5, reduction="sum") for a, b in (eager, exact))
    assert (loss - goal).abs() <= 2 * (found - goal).abs() + 1e-4


@pytest.mark.parametrize(("teacher_words", "temperature"), [(11, 1.0), (29, 2.0)])
def test_sorted_probabilities_of_two_vocabularies_are_numpys_and_torchs(teacher_words: int, temperature: float) -> None:
    taught = 2 * torch.randn(N, teacher_words, generator=torch.Generator().manual_seed(1)).double()
    logprobs = (taught / temperature).log_softmax(-1)
    leaf, theirs = HIDDEN.clone().requires_grad_(), HIDDEN.clone().requires_grad_()
    loss, losses = linear_distillation(
        leaf, HEAD, LABELS, lambda rows: TeacherLogprobs(logprobs[rows], ranked=True), Weights(0.4 * ONES, 0.6 * ONES),
        beta=0, temperature=temperature, bias=BIAS, chunk_tokens=5,
    )  # fmt: skip
    # NumPy: both sorted from the largest, the shorter one with zeros at its end
    width = max(V, teacher_words)
    p, q = (np.exp(x.numpy()) for x in (logprobs, (student_logits(HIDDEN, None) / temperature).log_softmax(-1)))
    p, q = (np.pad(-np.sort(-x), ((0, 0), (0, width - x.shape[1]))) for x in (p, q))
    np.testing.assert_allclose(losses[1].numpy(), np.abs(p - q).sum(1) * KEPT.numpy())
    # torch's own derivatives of the same
    logits = student_logits(theirs, None)
    q = F.pad((logits / temperature).softmax(-1).sort(descending=True).values, (0, width - V))
    expected = 0.6 * temperature**2 * (q - torch.from_numpy(p)).abs().sum(1)
    expected = (expected + 0.4 * F.cross_entropy(logits, LABELS, reduction="none"))[KEPT].sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(leaf.grad, theirs.grad)


def test_the_distance_of_sorted_probabilities_is_trls() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        gold = pytest.importorskip("trl.experimental.gold")
    from trl.experimental.gold.gold_trainer import ULDLoss

    names = ("crossentropy_weight", "use_extended_uld", "skip_student_eos", "skip_teacher_eos", "use_hybrid_loss")
    config = SimpleNamespace(
        **{f"uld_{name}": False for name in names},
        use_extended_uld=False,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_token_merge_strategy="observed",
    )
    assert set(vars(config)) - {"uld_use_extended_uld"} <= set(gold.GOLDConfig.__dataclass_fields__)
    student, teacher = student_logits(HIDDEN, None)[None], torch.randn(1, N, 29).double()
    labels = torch.zeros(1, N, dtype=torch.long)
    theirs = ULDLoss(config)(student, teacher, labels, labels, labels, labels)
    ours, _ = universal_logit_distance(teacher[0].log_softmax(-1), student[0].log_softmax(-1))
    torch.testing.assert_close(ours.mean(), theirs)
