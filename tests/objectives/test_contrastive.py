"""Contrastive losses against their formulas, written out term by term."""

import math

import pytest
import torch

from genai_pl.errors import ConfigError
from genai_pl.objectives import info_nce, matryoshka, recall_at_k, symmetric_info_nce

TAU = 0.05


def embeddings(*counts: int, n_embd: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, n_embd, generator=generator, dtype=torch.float64) for n in counts]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    dot = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    return dot / math.sqrt(sum(x * x for x in a.tolist()) * sum(y * y for y in b.tolist()))


def written_out(anchors, candidates, *, offset: int = 0, leave_out: set[tuple[int, int]] = frozenset()) -> float:
    total = 0.0
    for i, anchor in enumerate(anchors):
        terms = {j: math.exp(cosine(anchor, c) / TAU) for j, c in enumerate(candidates) if (i, j) not in leave_out}
        total -= math.log(terms[i + offset] / sum(terms.values()))
    return total


def test_info_nce_is_the_log_softmax_of_the_own_positive_among_all() -> None:
    a, p = embeddings(5, 5)
    assert info_nce(a, p, temperature=TAU).item() == pytest.approx(written_out(a, p))


def test_hard_negatives_are_further_candidates_of_every_anchor() -> None:
    a, p, n = embeddings(4, 4, 7)
    expected = written_out(a, torch.cat([p, n]))
    assert info_nce(a, p, n, temperature=TAU).item() == pytest.approx(expected)


def test_processes_that_gather_their_positives_sum_to_the_loss_of_the_whole_batch() -> None:
    a, p = embeddings(6, 6)
    parts = [info_nce(a[i : i + 2], p, temperature=TAU, offset=i) for i in (0, 2, 4)]
    assert sum(parts).item() == pytest.approx(written_out(a, p))
    whole = symmetric_info_nce(a, p, temperature=TAU)
    assert whole.item() == pytest.approx((written_out(a, p) + written_out(p, a)) / 2)
    halves = [symmetric_info_nce(a, p, temperature=TAU, rows=rows) for rows in (slice(0, 4), slice(4, 6))]
    torch.testing.assert_close(sum(halves), whole)


def test_the_double_of_a_positive_is_no_negative() -> None:
    a, p, n = embeddings(4, 4, 1)
    p[2], n[0] = p[0], p[1]
    ids = torch.tensor([7, 8, 7, 9, 8])
    expected = written_out(a, torch.cat([p, n]), leave_out={(0, 2), (2, 0), (1, 4)})
    assert info_nce(a, p, n, temperature=TAU, text_ids=ids).item() == pytest.approx(expected)


def test_simcse_is_the_same_text_under_two_dropouts() -> None:
    (h,) = embeddings(6)
    torch.manual_seed(0)
    first, second = torch.dropout(h, 0.1, True), torch.dropout(h, 0.1, True)
    expected = written_out(first, second)  # Gao et al. 2021, eq. 1: h^z and h^z'
    assert info_nce(first, second, temperature=TAU).item() == pytest.approx(expected)


def test_length_does_not_matter_and_bf16_under_autocast_is_as_exact_as_its_embeddings() -> None:
    a, p = embeddings(5, 5)
    assert info_nce(3 * a, 0.1 * p, temperature=TAU).item() == pytest.approx(written_out(a, p))
    a, p = a.bfloat16(), p.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(a, p, temperature=TAU)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(written_out(a, p), rel=1e-5)


def test_gradients_are_those_of_finite_differences() -> None:
    a, p, n = (e.requires_grad_() for e in embeddings(3, 3, 2, n_embd=4))
    assert torch.autograd.gradcheck(lambda *e: info_nce(*e, temperature=0.5), (a, p, n))


def test_matryoshka_is_the_mean_over_truncated_embeddings_negatives_included() -> None:
    a, p, n = embeddings(4, 4, 2)
    loss = matryoshka(info_nce, (2, 5, 8))(a, p, n, temperature=TAU)
    expected = sum(written_out(a[:, :d], torch.cat([p, n])[:, :d]) for d in (2, 5, 8)) / 3
    assert loss.item() == pytest.approx(expected)
    without = matryoshka(info_nce, (8,))(a, p, None, temperature=TAU)
    assert without.item() == pytest.approx(written_out(a, p))
    for dims in ((16,), (0, 8), ()):
        with pytest.raises(ConfigError, match="matryoshka dims"):
            matryoshka(info_nce, dims)(a, p, temperature=TAU)


def test_recall_counts_anchors_whose_positive_is_among_the_k_nearest() -> None:
    a, p = embeddings(40, 40, n_embd=3)
    for k in (1, 5, 40):
        expected = 0
        for i in range(40):
            nearest = sorted(range(40), key=lambda j: -cosine(a[i], p[j]))
            expected += i in nearest[:k]
        assert recall_at_k(a, p, k) == expected
        assert sum(recall_at_k(a[i : i + 20], p, k, offset=i) for i in (0, 20)) == expected
    assert recall_at_k(a, a, 1) == 40


def test_recall_finds_nothing_in_collapsed_embeddings_and_forgives_doubles_of_the_positive() -> None:
    same = torch.ones(6, 4)
    assert recall_at_k(same, same, 5) == 0
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert recall_at_k(texts, texts, 1) == 1
    assert recall_at_k(texts, texts, 1, text_ids=torch.tensor([4, 5, 4])) == 3


def test_doubles_leave_the_gradient_of_the_temperature_finite():
    generator = torch.Generator().manual_seed(0)
    anchors, positives = (torch.randn(4, 8, generator=generator) for _ in range(2))
    ids = torch.tensor([0, 1, 0, 2])
    temperature = torch.tensor(0.1, requires_grad=True)
    info_nce(anchors, positives, temperature=temperature, text_ids=ids).backward()
    step = 1e-3
    above, below = (info_nce(anchors, positives, temperature=0.1 + d, text_ids=ids) for d in (step, -step))
    torch.testing.assert_close(temperature.grad, (above - below) / (2 * step), rtol=1e-2, atol=0)


def test_the_anchors_own_text_is_no_candidate_against_it() -> None:
    a, p = embeddings(3, 3)
    p = torch.cat([a[:2].flip(0), p[2:]])  # pairs (x, y) and (y, x), and one of other texts
    ids, anchors = torch.tensor([2, 1, 4]), torch.tensor([1, 2, 3])
    options = {"temperature": TAU, "text_ids": ids}
    expected = written_out(a, p, leave_out={(0, 1), (1, 0)})
    assert info_nce(a, p, **options, anchor_ids=anchors).item() == pytest.approx(expected)
    assert info_nce(a, p, **options).item() > expected + 10
    parts = [info_nce(a[[i]], p, **options, offset=i, anchor_ids=anchors[[i]]) for i in range(3)]
    assert sum(parts).item() == pytest.approx(expected)  # as several processes see it
    pair = {"text_ids": ids[:2], "anchor_ids": anchors[:2]}
    assert recall_at_k(a[:2], p[:2], 1, **pair) == 2
    assert recall_at_k(a[:2], p[:2], 1, text_ids=ids[:2]) == 0


def test_both_ways_leave_the_own_text_out() -> None:
    a, p = embeddings(3, 3)
    p = torch.cat([a[:2].flip(0), p[2:]])
    ids, anchors = torch.tensor([2, 1, 4]), torch.tensor([1, 2, 3])
    out = {(0, 1), (1, 0)}
    expected = (written_out(a, p, leave_out=out) + written_out(p, a, leave_out=out)) / 2
    found = symmetric_info_nce(a, p, temperature=TAU, text_ids=ids, anchor_ids=anchors)
    assert found.item() == pytest.approx(expected)
