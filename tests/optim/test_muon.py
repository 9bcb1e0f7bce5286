"""Muon on hidden matrices against torch.optim.Muon, AdamW on the rest against torch.optim.AdamW, as one optimizer."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from genai_pl.optim import MuonAdamW, constant, muon
from genai_pl.optim.muon import orthogonalize

SHAPES = [(16, 64), (64, 16), (16, 16), (1, 8)]
OPTIONS = {
    "lr": 0.02,
    "adam_lr": 0.003,
    "momentum": 0.95,
    "nesterov": True,
    "adjust_lr": "match_rms_adamw",
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "weight_decay": 0.1,
}


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(13, 8)
        self.position = nn.Embedding(6, 8)
        self.up_proj = nn.Linear(8, 16)
        self.down_proj = nn.Linear(16, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 13, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids) + self.position.weight
        return self.lm_head(self.norm(x + self.down_proj(torch.relu(self.up_proj(x)))))


def backward(model: TinyModel, step: int) -> Tensor:
    input_ids = torch.randint(13, (4, 6), generator=torch.Generator().manual_seed(step))
    loss = nn.functional.cross_entropy(model(input_ids).flatten(0, 1), input_ids.roll(-1, 1).flatten())
    loss.backward()
    return loss


def exact_newton_schulz(matrix: Tensor) -> Tensor:
    """Jordan's iteration in float64, on singular values alone: it leaves the singular vectors where they are."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vt


def torch_update(matrix: Tensor) -> Tensor:
    """What torch.optim.Muon subtracts from a zero weight at lr 1: its own orthogonalization, in bfloat16."""
    weight = nn.Parameter(torch.zeros_like(matrix))
    weight.grad = matrix
    torch.optim.Muon([weight], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0).step()
    return -weight.detach() / max(1.0, matrix.size(0) / matrix.size(1)) ** 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalization_follows_the_singular_values_in_float64(shape: tuple[int, int]):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalize(matrix).double(), exact_newton_schulz(matrix), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalization_is_torch_muon_to_bfloat16_rounding(shape: tuple[int, int]):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    torch_error = (torch_update(matrix).double() - exact_newton_schulz(matrix)).norm()
    assert (orthogonalize(matrix) - torch_update(matrix)).norm() <= 2 * torch_error


def test_a_zero_gradient_orthogonalizes_to_zero():
    assert torch.equal(orthogonalize(torch.zeros(4, 6)), torch.zeros(4, 6))


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_matrices_follow_torch_muon_and_the_rest_torch_adamw(adjust_lr: str, nesterov: bool):
    ours, theirs = TinyModel(), TinyModel()
    optimizer = muon(ours.named_parameters(), **{**OPTIONS, "adjust_lr": adjust_lr, "nesterov": nesterov})
    hidden = [theirs.up_proj.weight, theirs.down_proj.weight]
    tables = [theirs.embed_tokens.weight, theirs.position.weight, theirs.lm_head.weight]
    vectors = [theirs.up_proj.bias, theirs.norm.weight, theirs.norm.bias]
    torch_muon = torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust_lr)
    torch_adamw = torch.optim.AdamW(
        [{"params": tables, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.003,
        betas=(0.9, 0.95),
        foreach=False,
    )
    gradients = torch.Generator().manual_seed(7)
    for _ in range(3):  # the same gradients for both: bfloat16 rounding must not feed back through a model
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=gradients)
            b.grad = a.grad.clone()
        optimizer.step()
        torch_muon.step()
        torch_adamw.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        is_hidden = any(b is matrix for matrix in hidden)
        moved = 3 * 0.02 * (0.2 * 16**0.5 if adjust_lr == "match_rms_adamw" else 2**0.5)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0.02 * moved if is_hidden else 1e-6)


def test_the_split_goes_by_name_and_by_dimension():
    optimizer = muon(TinyModel().named_parameters(), **OPTIONS)
    names = {(group["algorithm"], group["weight_decay"]): group["param_names"] for group in optimizer.param_groups}
    assert names == {
        ("muon", 0.1): ["up_proj.weight", "down_proj.weight"],
        ("adamw", 0.1): ["embed_tokens.weight", "position.weight", "lm_head.weight"],
        ("adamw", 0.0): ["up_proj.bias", "norm.weight", "norm.bias"],
    }


@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 64, 16)])
def test_each_expert_of_a_tensor_is_orthogonalized_alone(shape: tuple[int, ...]):
    tensor = (
        torch.randn(shape, generator=torch.Generator().manual_seed(1))
        * torch.tensor([1.0, 9.0, 0.1])[: shape[0], None, None]
    )
    alone = torch.stack([orthogonalize(matrix) for matrix in tensor])
    torch.testing.assert_close(orthogonalize(tensor), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone[0].double(), exact_newton_schulz(tensor[0]), rtol=0, atol=1e-4)


def test_a_tensor_of_experts_moves_as_its_matrices_would_and_their_biases_are_vectors():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Module()
            self.experts.weight = nn.Parameter(torch.ones(3, 8, 4))
            self.experts.bias = nn.Parameter(torch.ones(3, 8))

    layer, single = Layer(), [nn.Parameter(torch.ones(8, 4)) for _ in range(3)]
    optimizer = muon(layer.named_parameters(), **OPTIONS)
    others = muon([(f"layer{n}.weight", parameter) for n, parameter in enumerate(single)], **OPTIONS)
    assert {group["algorithm"]: group["param_names"] for group in optimizer.param_groups} == {
        "muon": ["experts.weight"],
        "adamw": ["experts.bias"],
    }
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    layer.experts.weight.grad = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    for parameter, gradient in zip(single, layer.experts.weight.grad, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()
    others.step()
    torch.testing.assert_close(layer.experts.weight, torch.stack(single), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", ["up_proj.weight", "embed_tokens.weight"])
def test_it_trains_a_model_that_has_only_one_kind_of_parameter(layer: str):
    model = TinyModel()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == layer)
    optimizer = muon(model.named_parameters(), **OPTIONS)
    before = model.get_parameter(layer).detach().clone()
    backward(model, 0)
    optimizer.step()
    assert not torch.equal(model.get_parameter(layer), before)


def test_one_lambda_lr_scales_the_rate_of_matrices_and_of_the_rest():
    model = TinyModel()
    optimizer = muon(model.named_parameters(), **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(constant, total_steps=9, warmup_steps=4))
    for step in range(5):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.02 * step / 4, 0.003 * step / 4, 0.003 * step / 4])
        backward(model, step)
        optimizer.step()
        scheduler.step()


def test_at_rate_zero_nothing_moves():
    model = TinyModel()
    before = copy.deepcopy(model.state_dict())
    optimizer = muon(model.named_parameters(), **OPTIONS)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    backward(model, 0)
    optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned():
    model = TinyModel()
    optimizer = muon(model.named_parameters(), **OPTIONS)
    loss = optimizer.step(closure=partial(backward, model, 0))
    assert loss.item() == pytest.approx(backward(TinyModel(), 0).item())


def test_a_copy_of_model_and_optimizer_steps_like_the_original():
    model = TinyModel()
    optimizer = muon(model.named_parameters(), **OPTIONS)
    backward(model, 0)
    optimizer.step()
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        o.zero_grad()
        backward(m, 1)
        o.step()
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_it_learns():
    model = TinyModel()
    optimizer: MuonAdamW = muon(model.named_parameters(), **OPTIONS)
    first = backward(model, 0).item()
    for _ in range(150):
        optimizer.step()
        optimizer.zero_grad()
        last = backward(model, 0).item()
    assert last < 0.5 * first
