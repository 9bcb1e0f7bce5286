"""Each builder against torch's own optimizer, or against its formula in numpy."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from genai_pl.errors import ConfigError
from genai_pl.optim import adafactor, adam, adamw, muon, sgd

ADAM = {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
SGD = {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 0.01}
ADAFACTOR = {"lr": 0.01, "beta2_decay": -0.8, "clip_threshold": 1.0, "weight_decay": 0.1}
MUON = {**ADAM, "adam_lr": None, "momentum": 0.95, "nesterov": True, "adjust_lr": "match_rms_adamw"}
BUILDERS = [(adamw, ADAM), (adam, ADAM), (sgd, SGD), (adafactor, ADAFACTOR), (muon, MUON)]
every_optimizer = pytest.mark.parametrize(("build", "options"), BUILDERS, ids=lambda x: getattr(x, "__name__", ""))


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def train(model: nn.Module, optimizer: Optimizer, steps: int = 4, first: int = 0) -> list[Tensor]:
    """The parameters after some steps on fixed inputs."""
    for step in range(first, first + steps):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def split(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Groups written by hand: the two weights of the linear layers decay."""
    matrices = [model[0].weight, model[2].weight]
    vectors = [model[0].bias, model[1].weight, model[1].bias, model[2].bias]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


@pytest.mark.parametrize(
    ("build", "options", "torch_optimizer"),
    [
        (adamw, ADAM, lambda groups: torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), foreach=False)),
        (adam, ADAM, lambda groups: torch.optim.Adam(groups, lr=0.01, betas=(0.9, 0.95), foreach=False)),
        (sgd, {**SGD, "weight_decay": 0.1}, lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)),
        (adafactor, ADAFACTOR, lambda groups: torch.optim.Adafactor(groups, lr=0.01)),
    ],
    ids=["adamw", "adam", "sgd", "adafactor"],
)
def test_it_steps_as_torch_does_on_groups_written_by_hand(
    build: Callable[..., Optimizer], options: dict[str, object], torch_optimizer: Callable[..., Optimizer]
):
    ours, theirs = small_model(), small_model()
    trained = train(ours, build(ours.named_parameters(), **options))
    torch.testing.assert_close(trained, train(theirs, torch_optimizer(split(theirs, 0.1))), rtol=1e-5, atol=1e-6)


def test_plain_sgd_is_theta_minus_lr_times_gradient_plus_decay():
    theta = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 4.0]]))
    theta.grad = torch.tensor([[0.3, 0.1], [-0.2, 0.0]])
    sgd([("weight", theta)], lr=0.5, momentum=0.0, nesterov=False, weight_decay=0.1).step()
    start, gradient = np.array([[1.0, -2.0], [0.5, 4.0]]), np.array([[0.3, 0.1], [-0.2, 0.0]])
    np.testing.assert_allclose(theta.detach().numpy(), start - 0.5 * (gradient + 0.1 * start), rtol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_with_momentum_and_l2_is_the_formula_in_numpy(nesterov: bool):
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(3, 2)), rng.normal(size=(5, 3, 2))
    theta, velocity = start.copy(), np.zeros((3, 2))
    parameter = nn.Parameter(torch.tensor(start))
    optimizer = sgd([("weight", parameter)], lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    for gradient in gradients:
        with_decay = gradient + 0.01 * theta
        velocity = 0.9 * velocity + with_decay
        theta = theta - 0.1 * (with_decay + 0.9 * velocity if nesterov else velocity)
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    np.testing.assert_allclose(parameter.detach().numpy(), theta, rtol=1e-12)


def test_adamw_is_the_formula_in_numpy():
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(3, 2)), rng.normal(size=(5, 3, 2))
    theta, mean, square = start.copy(), np.zeros((3, 2)), np.zeros((3, 2))
    parameter = nn.Parameter(torch.tensor(start))
    optimizer = adamw([("weight", parameter)], **ADAM)
    for t, gradient in enumerate(gradients, start=1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.95 * square + 0.05 * gradient**2
        direction = (mean / (1 - 0.9**t)) / (np.sqrt(square / (1 - 0.95**t)) + 1e-8)
        theta = theta - 0.01 * (direction + 0.1 * theta)
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    np.testing.assert_allclose(parameter.detach().numpy(), theta, rtol=1e-9)


@every_optimizer
def test_a_step_with_zero_gradient_shrinks_matrices_only(build: Callable[..., Optimizer], options: dict[str, object]):
    model = small_model()
    nn.init.ones_(model[0].bias)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build(model.named_parameters(), **{**options, "weight_decay": 0.1}).step()
    shrank = [bool(after.norm() < old.norm()) for after, old in zip(model.parameters(), before, strict=True)]
    kept = [torch.equal(after, old) for after, old in zip(model.parameters(), before, strict=True)]
    assert shrank == [parameter.ndim == 2 for parameter in model.parameters()]
    assert kept == [parameter.ndim == 1 for parameter in model.parameters()]


@every_optimizer
def test_a_saved_optimizer_loads_without_code_and_goes_on_bit_for_bit(
    build: Callable[..., Optimizer], options: dict[str, object], tmp_path
):
    model = small_model()
    optimizer = build(model.named_parameters(), **options)
    train(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.ckpt")
    straight = train(model, optimizer, first=4)

    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    resumed = small_model()
    resumed.load_state_dict(saved["model"])
    optimizer = build(resumed.named_parameters(), **options)
    optimizer.load_state_dict(saved["optimizer"])
    assert all(map(torch.equal, train(resumed, optimizer, first=4), straight))


@pytest.mark.parametrize(("build", "options"), [(adamw, ADAM), (adam, ADAM), (muon, MUON)])
def test_grad_scaler_unscales_before_the_step_so_that_clipping_sees_true_gradients(
    build: Callable[..., Optimizer], options: dict[str, object]
):
    plain, scaled = small_model(), small_model()
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = build(scaled.named_parameters(), **options)
    scaler.scale(scaled(x).square().mean()).backward()
    scaler.step(optimizer)
    plain(x).square().mean().backward()
    build(plain.named_parameters(), **options).step()
    for ours, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (adamw, {**ADAM, "lr": 0.0}, "optimizer.lr must be above 0"),
        (adamw, {**ADAM, "lr": float("nan")}, "optimizer.lr must be above 0"),
        (adam, {**ADAM, "lr": -1.0}, "optimizer.lr must be above 0"),
        (adamw, {**ADAM, "betas": [0.9, 1.0]}, "optimizer.betas must be two numbers"),
        (adamw, {**ADAM, "betas": [0.9]}, "optimizer.betas must be two numbers"),
        (adam, {**ADAM, "eps": -1e-8}, "optimizer.eps must be 0 or more"),
        (adamw, {**ADAM, "weight_decay": -0.1}, "optimizer.weight_decay must be 0 or more"),
        (sgd, {**SGD, "momentum": 1.0}, "optimizer.momentum must be at least 0 and below 1"),
        (sgd, {**SGD, "momentum": 0.0, "nesterov": True}, "optimizer.nesterov=true needs optimizer.momentum"),
        (adafactor, {**ADAFACTOR, "beta2_decay": 0.5}, "optimizer.beta2_decay must be 0 or less"),
        (adafactor, {**ADAFACTOR, "clip_threshold": 0.5}, "optimizer.clip_threshold must be at least 1"),
        (muon, {**MUON, "adam_lr": 0.0}, "optimizer.adam_lr must be above 0"),
        (muon, {**MUON, "adjust_lr": "none"}, "optimizer.adjust_lr must be one of match_rms_adamw, original"),
        (muon, {**MUON, "adjust_lr": "original"}, "optimizer.adjust_lr=original needs optimizer.adam_lr"),
    ],
)
def test_an_option_out_of_range_is_an_error_that_names_it(
    build: Callable[..., Optimizer], options: dict[str, object], message: str
):
    with pytest.raises(ConfigError, match=message):
        build(small_model().named_parameters(), **options)
