"""Permutation language modelling against transformers' masks and the numbers of XLNet."""

import numpy as np
import torch

from genai_pl.kernels import AttentionMask
from genai_pl.objectives import IGNORED, PermutationCollator
from tests.objectives.packed_rows import END, VOCABULARY, row, rows


def collator(**options) -> PermutationCollator:
    return PermutationCollator(vocabulary=VOCABULARY, seed=0, **options)


def visible(order: torch.Tensor, *, strict: bool) -> torch.Tensor:
    T = order.shape[1]
    return AttentionMask(order=order, strict=strict).dense(T, T)[:, 0]


def test_a_sixth_is_predicted_as_in_xlnet_and_labels_are_the_tokens_at_their_positions() -> None:
    given = rows(50, 512)
    batch = collator()(given)
    assert batch["labels"].shape == (50, 85)  # num_predict of XLNet's pretraining at 512
    assert batch["targets"] == 50 * 85
    assert torch.equal(batch["input_ids"], torch.from_numpy(np.stack([r["input_ids"] for r in given])))
    assert torch.equal(batch["input_ids"].gather(1, batch["target_positions"]), batch["labels"])
    assert (batch["target_positions"].diff(dim=1) > 0).all()


def test_targets_have_the_ranks_of_a_random_permutation_and_the_rest_has_rank_zero() -> None:
    batch = collator()(rows(4000, 36))
    ranks = batch["order"].gather(1, batch["target_positions"])
    assert torch.equal(ranks.sort(1).values, torch.arange(1, 7).expand(4000, 6))
    assert ((batch["order"] == 0).sum(1) == 30).all()
    counts = torch.stack([(ranks == rank).sum(0) for rank in range(1, 7)]).float()  # (rank, place)
    assert (counts - 4000 / 6).abs().max() < 5 * (4000 * 5 / 36) ** 0.5


def test_spans_have_up_to_five_tokens_and_contexts_of_six_times_their_length() -> None:
    batch = collator()(rows(300, 600))
    chosen = (batch["order"] > 0).int()
    assert (chosen.sum(1) == 100).all()
    padded = torch.nn.functional.pad(chosen, (1, 1))
    lengths = []
    for mask in padded:
        edges = mask.diff().nonzero().squeeze(-1)
        lengths += (edges[1::2] - edges[::2]).tolist()
    # uniform in 1..5; neighbouring spans touch now and then, so that a few are longer
    shares = np.bincount(lengths, minlength=12) / len(lengths)
    assert np.abs(shares[1:6] - 0.2).max() < 0.05
    assert shares[6:].sum() < 0.05


def test_targets_stand_everywhere_as_often() -> None:
    counts = (collator()(rows(4000, 50))["order"] > 0).sum(0)
    assert counts.sum() == 4000 * 8
    assert (counts - 640).abs().max() < 5 * (4000 * 0.16 * 0.84) ** 0.5
    # and no half of a long row has many more than the other: contexts of at most 30 tokens hold their share each
    halves = (collator()(rows(200, 600))["order"] > 0).view(200, 2, 300).sum(-1)
    assert (halves - 50).abs().max() <= 10


def test_special_tokens_are_no_targets_and_missing_targets_are_filled_up_without_label() -> None:
    given = [row(24, index, documents=(2, 2, 2, 2, 2, 2)) for index in range(50)]
    batch = collator()(given)
    assert (batch["labels"] != END).all()
    assert ((batch["labels"] != IGNORED).sum(1) == 3).all()  # of 18 text tokens
    assert (batch["labels"][:, 3:] == IGNORED).all()
    assert (batch["target_positions"][:, 3:] == 0).all()
    assert batch["labels"].shape[1] == 4  # of 24 tokens
    assert torch.equal(batch["segment_ids"], torch.from_numpy(np.stack([r["segment_ids"] for r in given])))


class Tokenizer:
    """What transformers' collator asks of one; no token is special here."""

    mask_token, mask_token_id, pad_token, pad_token_id, padding_side = "m", 900, "p", 901, "right"

    def get_special_tokens_mask(self, ids: list[int], already_has_special_tokens: bool) -> list[int]:
        return [0] * len(ids)


def test_an_order_hides_what_transformers_perm_mask_hides() -> None:
    from transformers import DataCollatorForPermutationLanguageModeling

    torch.manual_seed(0)
    theirs = DataCollatorForPermutationLanguageModeling(Tokenizer())
    given = [torch.from_numpy(np.array(r["input_ids"])) for r in rows(8, 48)]
    _, perm_mask, target_mapping, labels = theirs.torch_mask_tokens(torch.stack(given))
    predicted, hidden = labels != IGNORED, perm_mask.bool()  # 1: i cannot attend to j
    before = (~hidden & predicted[:, None, :]).sum(-1)  # how many targets a position sees
    order = torch.where(predicted, 1 + before, 0)
    assert torch.equal(target_mapping[0], torch.eye(48))  # there, prediction i is that of token i
    query, content = visible(order, strict=True), visible(order, strict=False)
    assert torch.equal(query[predicted], ~hidden[predicted])
    assert torch.equal(content, ~hidden | torch.eye(48, dtype=torch.bool))  # the content stream sees itself


def test_a_target_sees_the_context_and_the_targets_before_it_in_the_order_and_never_itself() -> None:
    batch = collator()([row(36)])
    positions, order = batch["target_positions"][0].tolist(), batch["order"][0].tolist()
    context = set(range(36)) - set(positions)
    z = sorted(positions, key=lambda position: order[position])
    query, content = visible(batch["order"], strict=True)[0], visible(batch["order"], strict=False)[0]
    for t, position in enumerate(z):  # Yang et al. 2019, section 2.3: g sees z_<t, h sees z_<=t
        assert set(query[position].nonzero().squeeze(-1).tolist()) == context | set(z[:t])
        assert set(content[position].nonzero().squeeze(-1).tolist()) == context | set(z[: t + 1])
    for position in context:
        assert set(content[position].nonzero().squeeze(-1).tolist()) == context
