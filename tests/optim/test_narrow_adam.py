"""Moments in fewer bits: near those of torch and of Muon, in fewer bytes, restored to the bit, converted between kinds."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from genai_pl.errors import ConfigError
from genai_pl.optim import adam, adamw, muon, sgd
from genai_pl.optim.narrow import dynamic_code, from_8_bits, to_8_bits, to_bfloat16
from tests.cli.test_commands import table
from tests.conftest import TINY

OPTIONS = {"lr": 3e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
NARROW = ("bf16", "int8")
BYTES = {"bf16": 1 / 2, "int8": 1 / 4}  # of those of float32


def regression(
    kind: str | None, build: Callable[..., Optimizer] = adamw, dtype: torch.dtype = torch.float32
) -> tuple[nn.Sequential, Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)).to(dtype)
    return model, build(model.named_parameters(), **OPTIONS, moments=kind)


def train(model: nn.Module, optimizer: Optimizer, steps: int = 40, first: int = 0) -> list[float]:
    """The losses of learning a linear map, the same data for every model."""
    goal = torch.randn(64, 64, generator=torch.Generator().manual_seed(99)) / 8
    losses = []
    for step in range(first, first + steps):
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
        loss = (model(x.to(model[0].weight.dtype)).float() - x @ goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def moment_bytes(optimizer: Optimizer) -> int:
    values = (v for state in optimizer.state.values() for name, v in state.items() if name != "step")
    return sum(v.numel() * v.element_size() for v in values)


@pytest.mark.parametrize(("build", "theirs"), [(adamw, torch.optim.AdamW), (adam, torch.optim.Adam)])
@pytest.mark.parametrize("kind", NARROW)
def test_losses_are_near_those_of_torch_in_a_fraction_of_the_bytes(
    kind: str, build: Callable[..., Optimizer], theirs: type[Optimizer]
) -> None:
    model, optimizer = regression(kind, build)
    losses = train(model, optimizer)
    right, _ = regression(None)
    groups = [
        {"params": [p for p in right.parameters() if p.ndim == d], "weight_decay": w} for d, w in ((2, 0.01), (1, 0))
    ]
    torchs = theirs(groups, lr=3e-3, betas=(0.9, 0.999))
    expected = train(right, torchs)
    assert expected[-1] < 0.8 * expected[0]
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=1e-3)
    assert moment_bytes(optimizer) == pytest.approx(BYTES[kind] * moment_bytes(torchs), rel=0.1)


def step_both(own: torch.Tensor, optimizer: object, weight: torch.Tensor, reference: object, *, steps: int) -> None:
    """Equal gradients for a weight in bfloat16 and for one in float32 that is rounded after each step."""
    for step in range(steps):
        gradient = torch.randn(256, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
        own.grad, weight.grad = gradient, gradient.float()
        optimizer.step()
        reference.step()
        weight.data = weight.data.bfloat16().float()


def test_moments_of_fp32_are_those_of_torch_beside_weights_in_bfloat16() -> None:
    """Of float32 weights that are rounded after each step."""
    model, optimizer = regression("fp32", dtype=torch.bfloat16)
    weight = model[0].weight.detach().float()
    reference = torch.optim.AdamW([weight.requires_grad_()], lr=3e-3, betas=(0.9, 0.999), weight_decay=0.01)
    step_both(model[0].weight, optimizer, weight, reference, steps=5)
    assert torch.equal(model[0].weight.float(), weight)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[model[0].weight][name], reference.state[weight][name])
    assert type(regression("fp32")[1]) is torch.optim.AdamW  # nothing to do beside weights in float32


@pytest.mark.parametrize("kind", NARROW)
def test_a_saved_state_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model, optimizer = regression(kind)
    train(model, optimizer, steps=5)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "last.ckpt")
    straight = train(model, optimizer, steps=5, first=5)
    weights, state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    again, restored = regression(kind)
    again.load_state_dict(weights)
    restored.load_state_dict(state)
    assert train(again, restored, steps=5, first=5) == straight
    for own, right in zip(restored.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(own[name], value) and own[name].dtype == value.dtype for name, value in right.items())


@pytest.mark.parametrize("before", [None, *NARROW])
@pytest.mark.parametrize("after", [None, *NARROW])
def test_a_state_of_one_kind_is_taken_over_by_another(before: str | None, after: str | None) -> None:
    model, optimizer = regression(before)
    train(model, optimizer, steps=5)
    restored = adamw(model.named_parameters(), **OPTIONS, moments=after)
    restored.load_state_dict(optimizer.state_dict())
    fresh = adamw(model.named_parameters(), **OPTIONS, moments=after)
    assert moment_bytes(fresh) == 0
    losses = train(model, restored, steps=1, first=5)
    dtype = {None: torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}[after]
    assert restored.state[model[0].weight]["exp_avg"].dtype == dtype
    right, optimizer = regression(None)
    assert losses == pytest.approx(train(right, optimizer, steps=6)[5:], rel=0.02)


def test_the_code_is_that_of_torchao() -> None:
    maps = pytest.importorskip("torchao.optim.quant_utils")
    for signed in (True, False):
        torch.testing.assert_close(dynamic_code(signed=signed), torch.tensor(maps.create_dynamic_map(signed)))


def test_the_code_has_256_numbers_and_the_largest_and_zero_are_exact() -> None:
    for signed in (True, False):
        code = dynamic_code(signed=signed)
        assert code.unique().numel() == 256
        assert {0.0, 1.0} < set(code.tolist())
    values = torch.randn(3, 600, generator=torch.Generator().manual_seed(0))
    values[1, 256:512] = 0.0
    codes, scales = to_8_bits(values, signed=True)
    assert (codes.shape, scales.shape) == ((3, 600), (3, 3))
    found = from_8_bits(codes, scales, signed=True)
    assert (found[1, 256:512] == 0.0).all()
    largest = values.clamp(min=0)[0, :256].argmax()
    torch.testing.assert_close(found[0, largest].abs(), values[0, largest].abs(), rtol=0.05, atol=0)
    # the widest gap, between 0.1 and 1, is 0.9 / 64; half of it, of the block's largest
    bound = 0.9 / 64 / 2 * scales.repeat_interleave(256, -1)[:, :600] * 1.01
    assert ((found - values).abs() <= bound).all()


def test_a_second_moment_above_zero_stays_above_zero() -> None:
    squares = torch.tensor([[1.0, 1e-9, 1e-12]])
    assert (from_8_bits(*to_8_bits(squares, signed=False), signed=False) > 0).all()
    nothing = torch.zeros(2, 3)
    assert torch.equal(from_8_bits(*to_8_bits(nothing, signed=False), signed=False), nothing)


def rounded(values: Tensor, steps: int) -> Tensor:
    return torch.stack([to_bfloat16(values, torch.tensor(float(step))).double() for step in range(steps)])


def test_rounding_at_random_keeps_the_mean_and_what_bfloat16_holds() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 1e-3
    draws = rounded(values, 400)
    spacing = 2.0**-8 * values.double().abs()  # at least half of it between neighbours in bfloat16
    assert ((draws - values.double()).abs() <= 2 * spacing).all()
    deviation = (draws.mean(0) - values.double()) / spacing
    assert deviation.abs().max() < 5 / 400**0.5  # five standard errors of a mean of 400, at most 1 each
    exact = values.bfloat16()
    assert torch.equal(to_bfloat16(exact.float(), torch.tensor(3.0)), exact)
    # a decay of 0.1 % moves it in the end, where rounding to nearest would never
    value = torch.ones(1000)
    for step in range(1000):
        value = to_bfloat16(value * 0.999, torch.tensor(float(step))).float()
    assert value.mean().item() == pytest.approx(0.999**1000, rel=0.05)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.moments must be one of fp32, bf16, int8, not fp4"):
        regression("fp4")


def test_a_run_resumes_exactly_and_steps_in_backward_as_after_it(command, tmp_path: Path) -> None:
    few = ("optimizer=adamw", "optimizer.moments=int8", "callbacks.checkpoint.every_n_steps=2")
    options = (*TINY, "trainer.gradient_clip_val=null", *few)
    assert command("train", *options, "hydra.run.dir=whole").status == 0
    early = command("train", *options, "trainer.optimizer_in_backward=true", "hydra.run.dir=early")
    assert early.status == 0, early.err
    paths = [tmp_path / name / "checkpoints" / "last.ckpt" for name in ("whole", "early")]
    whole, early = (torch.load(path, weights_only=True) for path in paths)
    assert any("exp_avg_scale" in state for state in whole["optimizer_states"][0]["state"].values())
    for name, value in whole["state_dict"].items():
        assert torch.equal(early["state_dict"][name], value), name
    before = table(tmp_path / "whole")
    paths[0].unlink()
    result = command("train", "resume=whole/checkpoints/step=000002.ckpt")
    assert result.status == 0, result.err
    assert table(tmp_path / "whole") == before


def one_momentum(name: str, kind: str | None, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Optimizer]:
    """A model whose matrices have one moment each, stepped by SGD or Muon."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)).to(dtype)
    if name == "sgd":
        options = {"lr": 0.3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
        return model, sgd(model.named_parameters(), **options, moments=kind)
    options = {**OPTIONS, "adam_lr": None, "momentum": 0.95, "nesterov": True, "adjust_lr": "match_rms_adamw"}
    return model, muon(model.named_parameters(), **options, moments=kind)


@pytest.mark.parametrize("name", ["sgd", "muon"])
@pytest.mark.parametrize("kind", NARROW)
def test_a_momentum_in_fewer_bits_trains_as_in_float32_and_is_restored_to_the_bit(
    name: str, kind: str, tmp_path: Path
) -> None:
    model, optimizer = one_momentum(name, kind)
    losses = train(model, optimizer, steps=20)
    right, exact = one_momentum(name, None)
    expected = train(right, exact, steps=20)
    assert expected[-1] < 0.8 * expected[0]
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=1e-3)
    assert moment_bytes(optimizer) == pytest.approx(BYTES[kind] * moment_bytes(exact), rel=0.15)
    # saved and restored, by the same kind and by float32
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "last.ckpt")
    straight = train(model, optimizer, steps=3, first=20)
    for after in (kind, None):
        weights, state = torch.load(tmp_path / "last.ckpt", weights_only=True)
        again, restored = one_momentum(name, after)
        again.load_state_dict(weights)
        restored.load_state_dict(state)
        rel = 0 if after else 0.02
        assert train(again, restored, steps=3, first=20) == pytest.approx(straight, rel=rel, abs=0)
    both = copy.deepcopy([model, optimizer])
    assert train(*both, steps=2, first=23) == train(model, optimizer, steps=2, first=23)
    # a state in float32 is taken over
    again, restored = one_momentum(name, kind)
    restored.load_state_dict(exact.state_dict())
    buffer = restored.state[again[0].weight]["momentum_buffer"]
    assert buffer.dtype == {"bf16": torch.bfloat16, "int8": torch.uint8}[kind]


def test_a_momentum_of_fp32_is_that_of_torch_beside_weights_in_bfloat16() -> None:
    model, optimizer = one_momentum("sgd", "fp32", torch.bfloat16)
    weight = model[0].weight.detach().float()
    reference = torch.optim.SGD([weight.requires_grad_()], lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.01)
    step_both(model[0].weight, optimizer, weight, reference, steps=4)
    assert torch.equal(model[0].weight.float(), weight)
    with pytest.raises(ConfigError, match=r"optimizer\.moments=bf16: there are none without momentum"):
        sgd(model.named_parameters(), lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0, moments="bf16")
