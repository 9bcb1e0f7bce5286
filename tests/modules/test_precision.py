"""Low precision touches products only; and a gradient that overflows in fp16 skips a step."""

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from genai_pl.data.loader import BatchPlan, EpochLoader
from genai_pl.errors import TrainingError
from genai_pl.kernels import AttentionMask, attention
from genai_pl.models import Decoder, ModelConfig
from genai_pl.modules import base
from genai_pl.objectives import CausalLMCollator
from genai_pl.objectives.token_loss import token_loss
from genai_pl.training.library_messages import silence_libraries
from tests.modules.test_normalization import module, rows, weights


@pytest.fixture(autouse=True)
def _quiet() -> None:
    silence_libraries()
    warnings.filterwarnings("ignore", ".*have no `val_dataloader`.*")


class Overflow(nn.Module):
    """Gradients that are infinite in some of its backward passes."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.bad, self.n = bad, 0

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            n, self.n = self.n, self.n + 1
            x.register_hook(lambda gradient: gradient * (float("inf") if n in self.bad else 1.0))
        return x


def fit(bad: set[int], steps: int = 4) -> base.BaseModule:
    ours = module()
    ours.model.norm = nn.Sequential(ours.model.norm, Overflow(bad))
    loader = EpochLoader(rows(), CausalLMCollator(), BatchPlan(batch_size=4, accumulate=1, seed=0))
    trainer = L.Trainer(
        max_steps=steps, limit_val_batches=0, logger=False, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))],
    )  # fmt: skip
    trainer.fit(ours, loader)
    return ours


def test_a_gradient_that_overflows_in_fp16_is_a_step_skipped_counted_and_no_error(caplog) -> None:
    caplog.set_level("INFO")
    ours = fit({1, 3})
    assert ours.skipped == 2
    assert ours.update_metrics()["train/skipped_steps"] == 2
    assert torch.isfinite(weights(ours)).all()
    assert ours.trainer.precision_plugin.scaler.get_scale() == 2.0  # halved twice
    said = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert ["step 2 skipped" in said[0], "step 4 skipped" in said[1]] == [True, True]


def test_fp16_that_skips_every_step_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MAX_SKIPPED", 3)
    with pytest.raises(TrainingError, match="3 steps in a row skipped up to step 3"):
        fit(set(range(9)), steps=9)


SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 50, "max_seq_len": 16}


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_norms_softmax_and_loss_are_as_exact_as_in_float32(norm: str, precision: str) -> None:
    """Of a value that bfloat16 holds, each may lose no more than the rounding of its result."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**SIZES, norm=norm)).to(dtype)
    x = (5 + torch.randn(4, 16, 32)).to(torch.bfloat16)
    q = 4 * torch.randn(2, 2, 16, 16).to(torch.bfloat16)
    exact_norm = model.norm.to(torch.float64)(x.double())
    model.norm.to(dtype)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    with mixed, torch.no_grad():
        actual = model.norm(x.to(dtype))
        scores = attention(q, q, q, AttentionMask(causal=True))
        hidden = x.to(dtype)
        labels = torch.randint(0, 50, (4, 16))
        loss = token_loss(hidden, model.lm_head.weight, labels)
    one_rounding = 2.0**-8
    assert ((actual.double() - exact_norm).abs() <= one_rounding * exact_norm.abs() + 1e-5).all()
    exact = torch.nn.functional.scaled_dot_product_attention(*(q.double(),) * 3, is_causal=True)
    assert (scores.double() - exact).abs().max() <= 2 * one_rounding * exact.abs().max()
    assert loss.dtype == torch.float32
    logits = (hidden.bfloat16() @ model.lm_head.weight.bfloat16().t()).double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
