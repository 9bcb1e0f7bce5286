"""ORPO and CPO against the losses of TRL 1.16, whose likelihood is a mean over tokens."""

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from genai_pl.data.loader import BatchPlan, EpochLoader
from genai_pl.models import Decoder, ModelConfig
from genai_pl.modules.preference import PreferenceModule
from genai_pl.objectives.special_tokens import SpecialTokens
from genai_pl.optim import sgd

ROWS = 8
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")  # of Lightning, which says so of any plain loader
    for text in (
        "treespec, LeafSpec",
        "does not have many workers",
        "have no `val_dataloader`",
        "smaller than the logging",
    )
]


def rows() -> list[dict[str, np.ndarray]]:
    """Pairs of very different lengths, so that a mean of means would be far off."""
    draw = np.random.default_rng(0)
    sizes = [(int(draw.integers(1, 6)), int(draw.integers(1, 14)), int(draw.integers(1, 14))) for _ in range(ROWS)]
    roles = ("prompt", "chosen", "rejected")
    return [{role: draw.integers(0, 50, n) for role, n in zip(roles, size, strict=True)} for size in sizes]


def module(loss: str) -> PreferenceModule:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=50, max_seq_len=48, init_std=0.5))
    return PreferenceModule(
        model, vocabulary=SpecialTokens(size=50, pad=0), seed=0, loss=loss, beta=0.3, nll_coef=0.7,
        optimizer=lambda named: sgd(named, lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0),
        schedule=lambda step, total_steps: 1.0,
    )  # fmt: skip


def trained(loss: str, batch_size: int, accumulate: int) -> PreferenceModule:
    ours = module(loss)
    loader = EpochLoader(rows(), ours.collator, BatchPlan(batch_size=batch_size, accumulate=accumulate, seed=0))
    trainer = L.Trainer(
        max_steps=1, limit_val_batches=0, accumulate_grad_batches=accumulate, logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(ours, loader)
    return ours


def logps(model: Decoder, prompt: np.ndarray, said: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token after the first, and which of them are the completion's; one row alone."""
    ids = torch.from_numpy(np.concatenate([prompt, said]))[None]
    logprobs = model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logprobs, torch.arange(1, ids.shape[1]) >= len(prompt)


def trl(loss: str, model: Decoder, beta: float = 0.3, alpha: float = 0.7) -> torch.Tensor:
    """get_batch_loss_metrics of ORPOTrainer and CPOTrainer on one batch of all rows."""
    pairs = [[logps(model, row["prompt"], row[side]) for side in ("chosen", "rejected")] for row in rows()]
    if loss == "orpo":
        chosen, rejected = (torch.stack([pair[n][0][pair[n][1]].mean() for pair in pairs]) for n in (0, 1))
        log_odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
        nll = -torch.cat([pair[0][0] for pair in pairs]).mean()  # of the full prompt and response
        return nll - beta * F.logsigmoid(log_odds).mean()
    chosen, rejected = (torch.stack([pair[n][0][pair[n][1]].sum() for pair in pairs]) for n in (0, 1))
    nll = -torch.cat([pair[0][0][pair[0][1]] for pair in pairs]).mean()
    return -F.logsigmoid(beta * (chosen - rejected)).mean() + alpha * nll


@pytest.mark.parametrize("loss", ["orpo", "cpo"])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_the_loss_and_its_gradient_are_those_of_trl_on_the_whole_step(
    loss: str, batch_size: int, accumulate: int
) -> None:
    start, ours = module(loss).model, trained(loss, batch_size, accumulate)
    expected = trl(loss, start)
    assert ours.step_metrics()["train/loss"] == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    for name, parameter in start.named_parameters():
        moved = parameter.detach() - 0.1 * parameter.grad
        torch.testing.assert_close(dict(ours.model.named_parameters())[name].detach(), moved, atol=2e-6, rtol=1e-4)


def test_a_validation_is_the_mean_over_all_its_tokens() -> None:
    ours = module("orpo")
    trainer = L.Trainer(
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(rows(), batch_size=3, collate_fn=ours.collator)
    [actual] = trainer.validate(ours, loader, verbose=False)
    assert actual["val/loss"] == pytest.approx(trl("orpo", ours.model).item(), rel=1e-5)
