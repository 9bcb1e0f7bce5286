"""Routing in training: auxiliary losses by the stated rule over accumulation, loads and biases over the whole step."""

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from genai_pl.data.loader import BatchPlan, EpochLoader
from genai_pl.models import Decoder, ModelConfig
from genai_pl.models.experts import MoE
from genai_pl.modules import CausalLMModule
from genai_pl.modules.routing import Routing
from genai_pl.objectives import CausalLMCollator, SpecialTokens
from genai_pl.optim import sgd

VOCABULARY = SpecialTokens(size=50, n_bytes=np.ones(50, np.int64))
E, K = 4, 2
SIZES = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "vocab_size": 50,
    "max_seq_len": 20,
    "n_experts": E,
    "expert_size": 16,
}


def rows(n: int = 16) -> list[dict]:
    """Documents of very different lengths, so that batches are padded and hold different numbers of targets."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 20, (n,), generator=generator)
    return [
        {"input_ids": torch.randint(0, 50, (k,), generator=generator).numpy(), "segment_ids": torch.ones(k).numpy()}
        for k in lengths.tolist()
    ]


def module(**options: object) -> CausalLMModule:
    torch.manual_seed(0)
    return CausalLMModule(
        Decoder(ModelConfig(**{**SIZES, **options})),
        vocabulary=VOCABULARY,
        seed=0,
        optimizer=lambda named: sgd(named, lr=0.5, momentum=0.0, nesterov=False, weight_decay=0.0),
        schedule=lambda step, total_steps: 1.0,
    )


def loader(batch_size: int, accumulate: int) -> EpochLoader:
    return EpochLoader(rows(), CausalLMCollator(), BatchPlan(batch_size=batch_size, accumulate=accumulate, seed=0))


def trained(*, accumulate: int, **options: object) -> CausalLMModule:
    """A module after one optimizer step of two batches of four rows."""
    ours = module(**options)
    trainer = L.Trainer(
        max_steps=1, limit_val_batches=0, accumulate_grad_batches=accumulate, logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(ours, loader(4, accumulate))
    return ours


def by_hand(ours: CausalLMModule, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Cross entropy as a sum, and by layer transformers' balance loss, the z-loss and the load, over tokens that are real."""
    logits: list[Tensor] = []
    hooks = [
        layer.router.register_forward_hook(lambda _, args, out: logits.append(out[3]))
        for layer in ours.model.modules()
        if isinstance(layer, MoE)
    ]
    predicted = ours.model(batch["input_ids"], batch["segment_ids"])
    for hook in hooks:
        hook.remove()
    loss = torch.nn.functional.cross_entropy(
        predicted.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum"
    )
    real = batch["segment_ids"].flatten() != 0
    kept = [layer[real] for layer in logits]
    balance = [load_balancing_loss_func((layer,), E, K) / K for layer in kept]
    z = [layer.logsumexp(-1).square().mean() for layer in kept]
    loads = [torch.bincount(layer.topk(K).indices.flatten(), minlength=E).float() for layer in kept]
    return loss, balance, z, loads


@pytest.fixture(scope="module")
def stepped() -> CausalLMModule:
    return trained(accumulate=2, balance_loss=0.5, router_z_loss=0.1, balance_bias=0.01)


def test_a_step_follows_both_losses_of_each_micro_batch_weighted_by_its_targets(stepped: CausalLMModule) -> None:
    start = module(balance_loss=0.5, router_z_loss=0.1, balance_bias=0.01)
    batches = [batch for batch, _ in zip(loader(4, 2), range(2), strict=False)]
    assert batches[0]["targets"] != batches[1]["targets"]
    total, parts = sum(batch["targets"] for batch in batches), []
    for batch in batches:
        loss, balance, z, _ = by_hand(start, batch)
        parts.append(loss + batch["targets"] * (0.5 * sum(balance) + 0.1 * sum(z)))
    (sum(parts) / total).backward()
    for theirs, mine in zip(start.model.parameters(), stepped.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs - 0.5 * theirs.grad, atol=1e-6, rtol=1e-5)


def test_metrics_are_means_over_layers_and_the_loss_is_without_the_auxiliary_ones(stepped: CausalLMModule) -> None:
    start = module(balance_bias=0.01)
    batches = [batch for batch, _ in zip(loader(4, 2), range(2), strict=False)]
    with torch.no_grad():
        values = [by_hand(start, batch) for batch in batches]
    total = sum(batch["targets"] for batch in batches)
    metrics = stepped.update_metrics()
    for n, name in ((1, "balance_loss"), (2, "router_z_loss")):
        pairs = zip(batches, values, strict=True)
        expected = sum(batch["targets"] * sum(value[n]) / 2 for batch, value in pairs) / total
        assert metrics[f"train/{name}"] == pytest.approx(expected.item(), rel=1e-5)
    loads = [first + second for first, second in zip(values[0][3], values[1][3], strict=True)]
    ratios = [(load.max() / load.mean()).item() for load in loads]
    assert metrics["train/expert_load"] == pytest.approx(sum(ratios) / 2)
    assert [metrics[f"train/expert_load/layer_{n}"] for n in range(2)] == pytest.approx(ratios)
    assert stepped.step_metrics()["train/loss"] == pytest.approx((sum(v[0] for v in values) / total).item(), rel=1e-5)
    # the bias goes up by one step where an expert had too little, down where it had too much (DeepSeek-V3)
    layers = [layer for layer in stepped.model.modules() if isinstance(layer, MoE)]
    for layer, load in zip(layers, loads, strict=True):
        torch.testing.assert_close(layer.balance_bias, 0.01 * (load.mean() - load).sign())


def test_validation_has_no_auxiliary_loss_and_collects_nothing() -> None:
    batch = CausalLMCollator()(rows())
    plain, balanced = module(balance_loss=0.0).eval(), module(balance_loss=9.0).eval()
    assert torch.equal(plain.step(batch)["loss"], balanced.step(batch)["loss"])
    with balanced.routing.collected():
        balanced.step(batch)
    assert balanced.routing.loss(batch["targets"]) == 0.0


def test_frozen_routers_get_no_losses_and_no_bias() -> None:
    ours = module(balance_loss=9.0, balance_bias=0.1)
    ours.model.requires_grad_(False)
    batch = CausalLMCollator()(rows())
    with ours.routing.collected():
        ours.step(batch)
    assert ours.routing.loss(batch["targets"]) == 0.0
    ours.routing.finish_step(lambda value: value)
    assert not any(layer.balance_bias.any() for layer in ours.routing.layers)
    assert ours.routing.metrics(lambda value: value)["train/expert_load"] >= 1.0  # it is still reported


def test_dense_models_have_no_routing() -> None:
    routing = Routing(Decoder(ModelConfig(**{**SIZES, "n_experts": None, "expert_size": None})))
    with routing.collected():
        pass
    assert routing.loss(torch.ones(())) == 0.0
    assert routing.metrics(lambda value: value) == {}


@pytest.fixture(autouse=True, scope="module")
def _quiet(tmp_path_factory: pytest.TempPathFactory) -> None:
    import warnings

    from genai_pl.training.library_messages import silence_libraries

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("routing"))
        silence_libraries()
        warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", ".*have no `val_dataloader`.*")
        yield
