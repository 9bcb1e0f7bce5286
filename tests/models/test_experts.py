"""Mixture of experts: outputs, gradients and statistics equal to a loop over tokens and to transformers' blocks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dots1Config, MixtralConfig
from transformers.models.dots1.modeling_dots1 import Dots1MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

from genai_pl.errors import ConfigError
from genai_pl.kernels.grouped_linear import (
    by_groups,
    by_slices,
    grouped_linear,
    serves,
    weight_gradient_by_groups,
    weight_gradient_by_slices,
)
from genai_pl.models import Decoder, ModelConfig
from genai_pl.models.experts import MoE, collecting
from genai_pl.strategies import recompute

C, E, SIZE = 16, 6, 8
BASE = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": C,
    "n_experts": E,
    "expert_size": SIZE,
    "vocab_size": 40,
    "max_seq_len": 32,
}
LLAMA = {"gated_mlp": True, "activation": "silu", "bias": False, "norm": "rmsnorm", "position": "rotary"}


def mixture(**options: object) -> MoE:
    """A layer in float64 with drawn weights."""
    layer = MoE(ModelConfig(**{**BASE, **options})).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    if layer.balance_bias is not None:
        layer.balance_bias.normal_(std=0.2, generator=generator)
    return layer


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_token(layer: MoE, x: Tensor, config: ModelConfig) -> Tensor:
    """The definition: each token alone through each of its experts, by matrices taken out of the tensors."""
    rows = []
    for token in x.reshape(-1, C):
        logits = layer.router.weight @ token
        scores = logits.sigmoid() if config.router == "sigmoid" else logits.softmax(0)
        ranked = scores if layer.balance_bias is None else scores + layer.balance_bias
        chosen = ranked.argsort(descending=True)[: config.experts_per_token]
        weights = scores[chosen] / (scores[chosen].sum() if config.normalize_top_k else 1.0)
        out = torch.zeros(C, dtype=x.dtype)
        for weight, e in zip(weights, chosen.tolist(), strict=True):
            experts = layer.experts

            def apply(linear: nn.Module, y: Tensor, e: int = e) -> Tensor:
                return linear.weight[e] @ y + (0 if linear.bias is None else linear.bias[e])

            up = apply(experts.up_proj, token)
            gate = None if experts.gate_proj is None else apply(experts.gate_proj, token)
            hidden = F.gelu(up, approximate="tanh") if gate is None else F.silu(gate) * up
            out = out + weight * apply(experts.down_proj, hidden)
        rows.append(out if layer.shared is None else out + layer.shared(token))
    return torch.stack(rows).view(x.shape)


OPTIONS = {
    "softmax": LLAMA,
    "biases without a gate": {"experts_per_token": 1, "normalize_top_k": False},
    "sigmoid, bias, shared": {**LLAMA, "router": "sigmoid", "balance_bias": 0.01, "n_shared_experts": 2},
    "every expert": {**LLAMA, "experts_per_token": E, "normalize_top_k": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_outputs_and_gradients_are_those_of_a_loop_over_tokens(options: dict) -> None:
    layer, x = mixture(**options), inputs(2, 7).requires_grad_()
    config = ModelConfig(**{**BASE, **options})
    upstream = torch.randn(2, 7, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = [x, *layer.parameters()]
    y, exact = layer(x), by_token(layer, x, config)
    torch.testing.assert_close(y, exact, rtol=0, atol=1e-12)
    ours = torch.autograd.grad((y * upstream).sum(), wanted)
    theirs = torch.autograd.grad((exact * upstream).sum(), wanted, allow_unused=True)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if other is None else other, rtol=0, atol=1e-11)


def test_experts_without_tokens_get_gradients_of_zero() -> None:
    layer = mixture(**LLAMA)
    layer(inputs(1, 1)).sum().backward()  # one token, two of six experts
    used = layer.experts.up_proj.weight.grad.flatten(1).abs().sum(1) > 0
    assert used.sum() == 2
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_the_layer_is_mixtrals() -> None:
    config = MixtralConfig(hidden_size=C, intermediate_size=SIZE, num_local_experts=E, num_experts_per_tok=2)
    theirs, ours = MixtralSparseMoeBlock(config).double(), mixture(**LLAMA)
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.experts.gate_up_proj.copy_(torch.cat([ours.experts.gate_proj.weight, ours.experts.up_proj.weight], 1))
        theirs.experts.down_proj.copy_(ours.experts.down_proj.weight)
        x = inputs(2, 9)
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)  # their softmax is in float32


def test_sigmoid_scores_with_bias_and_shared_experts_are_dots1s() -> None:
    sizes = {"hidden_size": C, "moe_intermediate_size": SIZE, "n_routed_experts": E, "num_experts_per_tok": 2}
    theirs = Dots1MoE(Dots1Config(**sizes, n_shared_experts=2, norm_topk_prob=True)).double()
    ours = mixture(**LLAMA, router="sigmoid", balance_bias=0.01, n_shared_experts=2)
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.gate.e_score_correction_bias.copy_(ours.balance_bias)
        theirs.experts.gate_up_proj.copy_(torch.cat([ours.experts.gate_proj.weight, ours.experts.up_proj.weight], 1))
        theirs.experts.down_proj.copy_(ours.experts.down_proj.weight)
        theirs.shared_experts.load_state_dict(ours.shared.state_dict())
        x = inputs(2, 9)
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_the_balance_loss_is_that_of_transformers_and_of_the_paper(k: int) -> None:
    layer, x = mixture(**LLAMA, experts_per_token=k), inputs(3, 11)
    with collecting() as found:
        layer(x)
    logits = x.reshape(-1, C) @ layer.router.weight.T
    theirs = load_balancing_loss_func((logits,), E, k)  # it adds up the shares of the k choices: k where we have 1
    torch.testing.assert_close(found[0].balance_loss, theirs.double() / k)
    torch.testing.assert_close(found[0].router_z_loss, logits.logsumexp(1).square().mean())
    assert found[0].load.sum() == 33 * k


def test_an_even_load_has_a_balance_loss_of_one_and_a_single_expert_the_number_of_experts() -> None:
    layer = mixture(**LLAMA, experts_per_token=1)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0] = 1000.0
    with collecting() as found:
        layer(inputs(1, 8).abs())
    torch.testing.assert_close(found[0].balance_loss.item(), float(E))
    with torch.no_grad():
        layer.router.weight.copy_(100.0 * torch.eye(E, C))
    with collecting() as found:
        layer(torch.eye(C, dtype=torch.float64)[None, :E])
    torch.testing.assert_close(found[0].balance_loss.item(), 1.0)


def test_padding_is_not_counted() -> None:
    model = Decoder(ModelConfig(**{**BASE, **LLAMA}))
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.zeros(2, 5, dtype=torch.long)], 1)
    segments = torch.cat([torch.ones(2, 9), torch.zeros(2, 5)], 1).long()
    with collecting() as found:
        model(ids, torch.ones(2, 9).long())
        model(padded, segments)
    assert torch.equal(found[0].load, found[1].load)
    torch.testing.assert_close(found[0].balance_loss, found[1].balance_loss)
    torch.testing.assert_close(found[0].router_z_loss, found[1].router_z_loss)


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputed_blocks_have_the_same_gradients_auxiliary_losses_included(kind: str) -> None:
    gradients = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        model = Decoder(ModelConfig(**{**BASE, **LLAMA, "n_layer": 2, "dropout": 0.1}))
        if recomputed:
            recompute(model, 1, kind=kind)
        torch.manual_seed(1)
        with collecting() as found:
            loss = model(torch.arange(20).view(2, 10)).logsumexp(-1).sum()
        (loss + sum(routing.balance_loss + routing.router_z_loss for routing in found)).backward()
        assert len(found) == 2
        gradients.append([parameter.grad for parameter in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_grouped_products_of_torch_are_those_of_slices_and_empty_groups_are_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(11, 8, generator=generator), torch.randn(4, 16, 8, generator=generator)
    d_y, ends = torch.randn(11, 16, generator=generator), torch.tensor([3, 3, 9, 11], dtype=torch.int32)
    torch.testing.assert_close(by_groups(x, weight, ends), by_slices(x, weight, ends))
    torch.testing.assert_close(by_groups(d_y, weight.mT, ends), by_slices(d_y, weight.mT, ends))
    ours = weight_gradient_by_slices(d_y, x, ends)
    torch.testing.assert_close(weight_gradient_by_groups(d_y, x, ends), ours)
    assert not ours[1].any()
    assert not serves(x, 16, 8)  # on a GPU in bfloat16 only


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck in torch 2.15
def test_grouped_linear_has_exact_gradients_and_follows_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(3, 4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(grouped_linear, (x, weight, ends))
    torch.library.opcheck(torch.ops.genai_pl.grouped_linear, (x, weight, ends))
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_linear(x.float(), weight.float(), ends).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts_per_token": 7}, "experts_per_token"),
        ({"n_dense_layers": 1}, "n_dense_layers"),
        ({"balance_loss": -0.1}, "balance_loss"),
        ({"expert_size": 0}, "expert_size"),
        ({"share_layers": True, "shape": "encoder"}, "share_layers"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ModelConfig(**{**BASE, **options})


def test_layers_with_experts_follow_transformers_rule() -> None:
    for every, dense in [(1, 0), (1, 2), (2, 0), (2, 1), (3, 4)]:
        config = ModelConfig(**{**BASE, "n_layer": 7, "expert_every": every, "n_dense_layers": dense})
        expected = [n for n in range(7) if n >= dense and (n + 1) % every == 0]  # decoder_sparse_step, first_k_dense
        assert list(config.mixture_layers) == expected
    assert not ModelConfig(**{**BASE, "n_experts": 0}).mixture_layers


def test_cached_decoding_is_the_full_forward_pass() -> None:
    model = Decoder(ModelConfig(**{**BASE, **LLAMA, "n_layer": 2, "n_shared_experts": 1})).eval()
    ids = torch.randint(40, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full, cache = model(ids), model.new_cache(3, 12)
        parts = [model(ids[:, :5], cache=cache), *(model(ids[:, n : n + 1], cache=cache) for n in range(5, 12))]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-5)
