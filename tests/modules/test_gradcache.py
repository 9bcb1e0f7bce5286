"""GradCache: a contrastive batch embedded in chunks gives the gradient of the whole batch, and keeps one chunk's activations."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.models import ModelConfig, build_model
from genai_pl.modules import ContrastiveModule
from genai_pl.objectives import SpecialTokens

SIZES = {
    "shape": "encoder",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "vocab_size": 50,
    "max_seq_len": 20,
    "head": "none",
}


def module(chunk: int | None, *, dropout: float = 0.0, **more: object) -> ContrastiveModule:
    torch.manual_seed(0)
    made = ContrastiveModule(
        build_model(ModelConfig(**SIZES, dropout=dropout, **more)).double(),
        vocabulary=SpecialTokens(size=50, n_bytes=np.ones(50, np.int64)), seed=0, optimizer=None, schedule=None,
        gradcache_chunk=chunk, learn_temperature=True,
    ).double()  # fmt: skip
    made._trainer = SimpleNamespace(world_size=1, global_rank=0)
    return made.train()


def pairs(n: int = 7) -> list[dict[str, np.ndarray]]:
    draw = np.random.default_rng(0)
    return [
        {role: draw.integers(3, 50, draw.integers(2, 12)) for role in ("anchor", "positive", "negative")}
        for _ in range(n)
    ]


def gradients(made: ContrastiveModule) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)  # of dropout
    loss = made.step(made.collator(pairs()))["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_loss_and_gradient_are_those_of_the_whole_batch(chunk: int) -> None:
    loss, expected = gradients(module(None))
    found_loss, found = gradients(module(chunk))
    torch.testing.assert_close(found_loss, loss, rtol=1e-12, atol=1e-12)
    assert found.keys() == expected.keys()
    assert "log_temperature" in found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)


def test_dropout_draws_the_same_numbers_in_the_second_pass() -> None:
    made = module(4, dropout=0.3)
    loss, found = gradients(made)
    # the same chunks without a second pass: autograd keeps all activations
    plain = module(4, dropout=0.3)
    plain.embed = lambda batch: torch.cat(
        [plain._embed(a, b) for a, b in zip(batch["input_ids"].split(4), batch["segment_ids"].split(4), strict=True)]
    )
    expected_loss, expected = gradients(plain)
    assert torch.equal(loss, expected_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)


def test_activations_of_the_forward_pass_are_not_kept() -> None:
    def kept(chunk: int | None) -> int:
        made, n = module(chunk), [0]
        batch = made.collator(pairs())

        def pack(x: Tensor) -> Tensor:
            n[0] += x.numel() if x.grad_fn is not None else 0
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            made.step(batch)
        return n[0]

    assert kept(4) < kept(None) / 20


@pytest.mark.parametrize(("chunk", "more"), [(0, {}), (4, {"n_experts": 2})])
def test_what_cannot_be_is_refused(chunk: int, more: dict) -> None:
    with pytest.raises(ConfigError, match=r"objective\.gradcache_chunk"):
        module(chunk, **more)


def test_strategies_that_gather_weights_are_refused() -> None:
    made = module(4)
    made._trainer.strategy = object()
    with pytest.raises(ConfigError, match=r"objective\.gradcache_chunk runs on one device or with strategy=ddp"):
        made.on_fit_start()
