"""Quantized bases: the levels of the paper, bounded errors, and adapters that work on them as on plain layers."""

import copy
import math
from pathlib import Path

import pytest
import torch
from peft_models import KINDS, build, frozen, logits_of, tokens, train
from torch import nn

from genai_pl.errors import ConfigError
from genai_pl.kernels.nf4 import NF4, from_nf4
from genai_pl.loading import load
from genai_pl.models import n_parameters
from genai_pl.peft import adapters_disabled, adapters_of, load_adapter, lora, merge, save_adapter
from genai_pl.peft.quantize import Quantized, QuantizedLinear, dequantize, quantize
from tests.conftest import TINY, some

PAPER = [  # appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
GPT = ("model=gpt", *TINY, "model.n_head=4", "model.max_seq_len=64", "optimizer.lr=1e-2")


def layer(kind: str, out_features: int = 256, in_features: int = 512) -> tuple[QuantizedLinear, nn.Linear]:
    torch.manual_seed(0)
    base = nn.Linear(in_features, out_features)
    nn.init.normal_(base.weight, std=0.02)
    return QuantizedLinear(base, kind), base


def stored(weight: Quantized) -> int:
    return sum(part.numel() * part.element_size() for part in (weight.codes, weight.scales))


def test_the_levels_are_the_paper_s():
    torch.testing.assert_close(torch.tensor(NF4), torch.tensor(PAPER), rtol=0, atol=3e-7)


def test_every_weight_becomes_the_nearest_level_of_its_block():
    quantized, base = layer("nf4", 3, 50)  # the last of three blocks is not full
    flat = torch.cat([base.weight.detach().flatten(), torch.zeros(3 * 64 - 150)]).view(3, 64)
    scales = flat.abs().amax(1, keepdim=True)
    nearest = (flat / scales)[..., None].sub(torch.tensor(PAPER)).abs().argmin(-1)
    expected = (torch.tensor(PAPER)[nearest] * scales).flatten()[:150].view(3, 50)
    torch.testing.assert_close(quantized.weight.dense(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("kind", "error", "size"), [("nf4", 0.1, 0.6), ("int8", 0.01, 1.01)])
def test_normal_weights_lose_little_and_shrink(kind: str, error: float, size: float):
    quantized, base = layer(kind)
    lost = (quantized.weight.dense() - base.weight).norm() / base.weight.norm()
    assert error / 3 < lost < error
    assert stored(quantized.weight) <= size * base.weight.numel()
    assert quantized.weight.numel() == base.weight.numel()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_is_quantized_twice_is_what_it_was_and_zeros_stay(kind: str):
    quantized, _ = layer(kind)
    again = QuantizedLinear(quantized, kind)
    assert torch.equal(again.weight.codes, quantized.weight.codes)
    zeros = nn.Linear(64, 2)
    nn.init.zeros_(zeros.weight)
    assert torch.equal(QuantizedLinear(zeros, kind).weight.dense(), torch.zeros(2, 64))


def test_a_layer_can_be_copied_moved_and_cast_and_keeps_no_dense_weight_for_the_backward_pass():
    quantized, base = layer("nf4")
    assert torch.equal(copy.deepcopy(quantized).weight.dense(), quantized.weight.dense())
    half = copy.deepcopy(quantized).bfloat16()
    assert isinstance(half.weight, Quantized)
    assert half.weight.codes.dtype == torch.uint8
    assert torch.equal(half.weight.dense(), quantized.weight.dense().bfloat16())
    assert copy.deepcopy(quantized).to("meta").weight.codes.is_meta
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        quantized(torch.randn(2, 3, 512, requires_grad=True)).sum().backward()
    assert sum(kept) < base.weight.numel()


# weight (2, 64), its largest magnitudes, and what bitsandbytes 0.50.2 makes of it on a CPU: quantize_nf4 and dequantize_nf4
BNB_CODES = (
    "79dfe30ea1f0f1ae03efd979dfe30ea1f0f1ae02efda8adfe21e91f0f18e12df"
    "ebacefd11e71f0f26f11cfedcdefb12f43e1e34f20affedeff803f25d1d62f50"
)
BNB_SCALES = [0.4999879002571106, 2.999786615371704]
BNB_NUMBERS = [
    [0.0, 0.08046315610408783, 0.28130170702934265, 0.4999879002571106, 0.36146965622901917, -0.19745396077632904,
     -0.4999879002571106, 0.36146965622901917],
    [2.1687161922454834, 1.0136736631393433, 0.7382844090461731, 1.3220354318618774, 2.1687161922454834, 2.999786615371704,
     1.6877309083938599, -2.0884299278259277],
]  # fmt: skip
WAVE = torch.sin(torch.arange(128.0) ** 2 / 7).view(2, 64) * torch.tensor([[0.5], [3.0]])


def test_codes_and_numbers_are_those_of_bitsandbytes():
    base = nn.Linear(64, 2, bias=False)
    base.weight.data = WAVE.clone()
    weight = QuantizedLinear(base, "nf4").weight
    assert bytes(weight.codes[:, 4:].flatten().tolist()).hex() == BNB_CODES
    torch.testing.assert_close(
        weight.codes[:, :4].view(torch.float32).flatten(), torch.tensor(BNB_SCALES), rtol=0, atol=0
    )
    torch.testing.assert_close(weight.dense()[:, :8], torch.tensor(BNB_NUMBERS), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_few_rows_without_gradients_are_the_dense_product(kind: str, rows: int):
    quantized, _ = layer(kind)
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(rows))
    expected = x.double() @ quantized.weight.dense().double().T + quantized.bias.double()
    with torch.no_grad():
        torch.testing.assert_close(quantized(x).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_without_a_compiler_the_numbers_are_the_same(kind: str, monkeypatch: pytest.MonkeyPatch):
    quantized, _ = layer(kind)
    x = torch.randn(2, 512)
    with torch.no_grad():
        compiled, dense = quantized(x), quantized.weight.dense()
        monkeypatch.setitem(Quantized.by_rows.__globals__, "is_built", lambda: False)
        torch.testing.assert_close(quantized(x), compiled, rtol=1e-5, atol=1e-6)
    assert torch.equal(quantized.weight.dense(), dense)


def test_blocks_that_cross_rows_are_dequantized():
    quantized, _ = layer("nf4", 4, 48)
    x = torch.randn(2, 48)
    assert quantized.weight.by_rows() is None
    weight = from_nf4(quantized.weight.codes, torch.Size((4, 48)))
    with torch.no_grad():
        torch.testing.assert_close(quantized(x), x @ weight.T + quantized.bias)


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}, {"target_modules": "all-linear"}], ids=str)
@pytest.mark.parametrize("bits", some(["nf4", "int8"]))
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_does_what_it_does_on_the_dequantized_model(kind: str, bits: str, options: dict[str, object]):
    base = quantize(build(kind), kind=bits)
    dense = dequantize(copy.deepcopy(base))
    model = build(kind)
    torch.manual_seed(1)
    on_dense = lora(dense, **options)
    torch.manual_seed(1)
    model = lora(model, quantize=bits, **options)
    assert torch.equal(logits_of(model), logits_of(on_dense))
    assert n_parameters(model) == n_parameters(on_dense)
    before = frozen(model)
    losses = train(model, 4)
    assert losses == train(on_dense, 4)
    assert losses[-1] < losses[0]
    for ours, theirs in zip(model.parameters(), on_dense.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    for old, new in zip(before, frozen(model), strict=True):
        assert torch.equal(old + 0, new + 0)
    with adapters_disabled(model.eval()):
        assert torch.equal(logits_of(model), logits_of(base))


@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_plain_layers(kind: str):
    model = lora(build(kind), quantize="nf4")
    train(model)
    model.eval()
    merged = merge(copy.deepcopy(model))
    assert not any(isinstance(module, QuantizedLinear) for module in merged.modules())
    assert all(type(p) is nn.Parameter and p.requires_grad for p in merged.parameters())
    assert merged.state_dict().keys() == build(kind).state_dict().keys()
    torch.testing.assert_close(logits_of(merged), logits_of(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_its_file_holds_the_adapter_alone_and_quantizes_the_base_again(kind: str, tmp_path: Path):
    model = lora(build(kind), quantize="nf4", dora=True)
    train(model)
    save_adapter(model, tmp_path, base="base")
    back = load_adapter(build(kind), tmp_path)
    assert torch.equal(logits_of(back.eval()), logits_of(model.eval()))
    assert adapters_of(back)[0].options["quantize"] == "nf4"
    size = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 2 * size + 20_000  # parts joined get zeros


def test_only_the_linear_layers_of_the_blocks_are_quantized_and_none_that_is_trained_whole():
    model = lora(build("llama"), quantize="int8", target_modules=["q_proj"], modules_to_save=["down_proj", "lm_head"])
    quantized_parts = {
        name.removesuffix(".base") for name, m in model.named_modules() if isinstance(m, QuantizedLinear)
    }
    parts = (
        "attention.q_proj",
        "attention.k_proj",
        "attention.v_proj",
        "attention.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    )
    assert quantized_parts == {f"blocks.{i}.{part}" for i in range(2) for part in parts}
    losses = train(model)
    assert losses[-1] < losses[0]


def test_a_second_adapter_finds_the_base_quantized():
    model = lora(lora(build("gpt2"), quantize="nf4"), quantize="nf4", rank=2)
    assert math.isfinite(train(model)[-1])
    late = lora(lora(build("gpt2")), quantize="nf4")
    assert sum(isinstance(m, QuantizedLinear) for m in late.modules()) == 12
    with pytest.raises(ConfigError, match=r"peft\.quantize=int8: this model is quantized to nf4 already"):
        lora(model, quantize="int8")
    with pytest.raises(ConfigError, match=r"peft\.quantize=nf5 is not one of nf4, int8"):
        lora(build("gpt2"), quantize="nf5")


@torch.no_grad()
def logits(path: str) -> torch.Tensor:
    return load(path).model(tokens())


@pytest.mark.parametrize("bits", some(["nf4", "int8"]))
def test_a_run_on_a_quantized_base_goes_on_exactly_and_comes_back(bits: str, command, tmp_path: Path):
    arguments = ("train", *GPT, "peft=lora", f"peft.quantize={bits}", "callbacks.checkpoint.every_n_steps=2")
    result = command(*arguments, "hydra.run.dir=run")
    assert result.status == 0, result.err
    assert f"quantize={bits}" in result.out
    run = tmp_path / "run"
    assert torch.equal(logits("run"), logits("run/checkpoints/last.ckpt"))
    with adapters_disabled(adapted := load("run").model), torch.no_grad():
        assert torch.equal(adapted(tokens()), quantize(load("run/base").model, kind=bits)(tokens()))
    adapter_bytes = (run / "adapter/adapter_model.safetensors").stat().st_size
    assert (run / "checkpoints/last.ckpt").stat().st_size <= 3 * adapter_bytes + 60_000
    assert command(*arguments, "hydra.run.dir=half").status == 0
    assert command("train", "resume=half/checkpoints/step=000002.ckpt").status == 0
    assert (tmp_path / "half/metrics.csv").read_text().count("\n") >= 4
    assert torch.equal(logits("half"), logits("run"))
    text = command("generate", "checkpoint=run", "prompt=A", "generation.max_new_tokens=4", "generation=greedy")
    assert text.status == 0, text.err
    assert command("export", "checkpoint=run", "format=merged", "out=merged").status == 0
    torch.testing.assert_close(logits("merged"), logits("run"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("option", some(["precision=bf16", "trainer.recompute_every=1", "peft.dora=true"]))
def test_it_goes_with_the_rest(option: str, command):
    result = command("train", *GPT, "peft=lora", "peft.quantize=nf4", option)
    assert result.status == 0, result.err
