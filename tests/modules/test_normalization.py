"""A token weighs the same wherever it stands: accumulation, packing and batch size change nothing but speed."""

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

from genai_pl.data.loader import BatchPlan, EpochLoader
from genai_pl.errors import TrainingError
from genai_pl.models import Decoder, ModelConfig
from genai_pl.modules import CausalLMModule
from genai_pl.objectives import CausalLMCollator, SpecialTokens
from genai_pl.optim import sgd

VOCABULARY = SpecialTokens(size=50, n_bytes=np.ones(50, np.int64))


def rows(n: int = 24, seed: int = 0) -> list[dict]:
    """Documents of very different lengths, so that a mean of means would be far off."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 20, (n,), generator=generator)
    return [
        {"input_ids": torch.randint(0, 50, (k,), generator=generator).numpy(), "segment_ids": torch.ones(k).numpy()}
        for k in lengths.tolist()
    ]


def module(**options) -> CausalLMModule:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=50, max_seq_len=20))
    return CausalLMModule(
        model,
        vocabulary=VOCABULARY,
        seed=0,
        optimizer=lambda named: sgd(named, lr=0.5, momentum=0.0, nesterov=False, weight_decay=0.0),
        schedule=lambda step, total_steps: 1.0,
        **options,
    )


def trained(batch_size: int, accumulate: int, steps: int = 3, clip: float | None = None, **options) -> CausalLMModule:
    ours = module(**options)
    loader = EpochLoader(rows(), CausalLMCollator(), BatchPlan(batch_size=batch_size, accumulate=accumulate, seed=0))
    trainer = L.Trainer(
        max_steps=steps, limit_val_batches=0, accumulate_grad_batches=accumulate, gradient_clip_val=clip, logger=False,
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(ours, loader)
    return ours


def weights(ours: CausalLMModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in ours.parameters()])


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (2, 4), (1, 8)])
def test_accumulation_gives_the_weights_and_losses_of_the_big_batch(batch_size: int, accumulate: int) -> None:
    big, small = trained(8, 1), trained(batch_size, accumulate)
    assert (weights(big) - weights(small)).abs().max() < 1e-6
    assert big.step_metrics()["train/loss"] == pytest.approx(small.step_metrics()["train/loss"], rel=1e-6)


def test_a_step_follows_the_gradient_of_the_mean_over_all_its_tokens() -> None:
    start, ours = module(), trained(8, 2, steps=1)
    batch = EpochLoader(rows(), CausalLMCollator(), BatchPlan(batch_size=16, seed=0))
    first = next(iter(batch))
    logits = start.model(first["input_ids"], first.get("segment_ids"))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), first["labels"].flatten(), ignore_index=-100)
    loss.backward()
    for theirs, mine in zip(start.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs - 0.5 * theirs.grad, atol=1e-6, rtol=1e-5)
    assert ours.step_metrics()["train/loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_gradients_are_clipped_to_the_global_norm_as_torch_does_it() -> None:
    start, ours = module(), trained(24, 1, steps=1, clip=0.1)
    batch = next(iter(EpochLoader(rows(), CausalLMCollator(), BatchPlan(batch_size=24, seed=0))))
    (start.step(batch)["loss"] / batch["targets"]).backward()
    norm = torch.nn.utils.clip_grad_norm_(start.parameters(), 0.1)
    assert ours.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    for theirs, mine in zip(start.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs - 0.5 * theirs.grad, atol=1e-6, rtol=1e-5)


def test_perplexity_and_bits_per_byte_follow_from_the_loss() -> None:
    ours = module()
    sums = {"loss": torch.tensor(200.0), "bytes": torch.tensor(400.0)}
    metrics = ours.summarize(sums, torch.tensor(100.0))
    assert metrics["loss"].item() == 2.0
    assert metrics["perplexity"].item() == pytest.approx(7.389056)
    assert metrics["bpb"].item() == pytest.approx(200 / 400 * 1.442695)


def test_validation_ignores_label_smoothing_and_z_loss() -> None:
    batch = CausalLMCollator()(rows())
    plain, smoothed = module().eval(), module(label_smoothing=0.1, z_loss=0.1).eval()
    assert torch.equal(plain.step(batch)["loss"], smoothed.step(batch)["loss"])
    assert smoothed.train().step(batch)["loss"] > plain.step(batch)["loss"]


def test_a_loss_that_is_not_a_number_names_the_step() -> None:
    ours = module()
    with torch.no_grad():
        ours.model.norm.weight[0] = float("nan")
    loader = EpochLoader(rows(), CausalLMCollator(), BatchPlan(batch_size=4))
    trainer = L.Trainer(
        max_steps=2, limit_val_batches=0, logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(TrainingError, match="the loss is not finite at step 1"):
        trainer.fit(ours, loader)


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    from genai_pl.training.library_messages import silence_libraries

    monkeypatch.chdir(tmp_path)
    silence_libraries()
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*have no `val_dataloader`.*")
