"""Quantized folders of others: numbers of the packages that packed them, models that load, refusals of one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from genai_pl.errors import CheckpointError
from genai_pl.loading import stored_dtypes
from genai_pl.models import load_pretrained, load_wrapped
from genai_pl.models.hf.folder import read_json, write_json
from genai_pl.models.hf.quantized import awq, compressed_tensors, gptq
from genai_pl.models.hf.quantized.codes import unpacked


def ints(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


# numbers of the packages


def test_awq_is_what_autoawq_dequantizes() -> None:
    """autoawq 0.2.9: WQLinear_GEMM.from_linear of 8 inputs in groups of 4, dequantize_gemm over the scales."""
    qweight = ints(
        [2131406639, 41942800, 551543020, 266931330], [6344960, 1894910985, -185828337, -503279368],
        [-33619724, -2395908, 100797424, -263195249], [-974686882, 118018751, 255918056, 938717168],
        [1027872, -1114160, -2096979777, -1861255670], [-808451313, 1191170097, 86499279, -786452],
        [-1062733161, 150997775, -1047537, -1375730177], [-50933746, -1891694090, 1061140223, 1130736],
    )  # fmt: skip
    qzeros = ints(
        [-2057963257, 1737517292, 2063169638, 1685563143], [1753757177, -1598393463, -1871054016, -2005731450]
    )
    differences = [
        [8, -7, -3, 7, -9, 6, -2, 5], [5, -5, 10, 2, 7, -8, -1, -2], [2, 0, 15, 5, -13, -15, -6, -15],
        [-5, 1, 10, 9, -8, 5, 2, 7], [6, -8, -9, -4, 10, -2, 5, -5], [10, -5, 8, 0, -8, 7, -8, 4],
        [-5, -2, -15, -8, 7, -3, 12, 10], [-1, -8, 7, 4, -6, 6, 6, 9],
    ]  # fmt: skip
    scales = torch.stack([torch.linspace(0.1, 0.9, 32), torch.linspace(3, 2, 32)]).half()
    expected = torch.tensor(differences) * scales.float().repeat_interleave(4, 0).t()[:8]
    assert torch.equal(awq.weight_of(qweight, qzeros, scales)[:8], expected)


def test_compressed_tensors_are_what_its_package_packs() -> None:
    """compressed-tensors 0.20.1: pack_to_int32 of 3 and 4 bits, of zeros along the outputs, pack_fp4_to_uint8."""
    three = ints(*[[-1468477784, -827819826, 2026809464]] * 2)
    codes = torch.arange(64).view(2, 32) * 5 % 8 - 4
    scales = torch.tensor([[0.5, 2.0], [3.0, 0.25]]).bfloat16()
    weight = compressed_tensors.weight_of_words(three, scales, None, None, shape=(2, 32), bits=3)
    assert torch.equal(weight, codes * scales.float().repeat_interleave(16, 1))
    # asymmetric, and groups in any order
    four, zeros = ints(*[[440163952, -1833642248]] * 2), ints([169, 5])
    codes, plain = torch.arange(32).view(2, 16) * 7 % 16 - 8, torch.tensor([[1, -3], [2, -8]])
    weight = compressed_tensors.weight_of_words(four, scales, zeros, None, shape=(2, 16), bits=4)
    assert torch.equal(weight, (codes - plain.repeat_interleave(8, 1)) * scales.float().repeat_interleave(8, 1))
    groups = torch.tensor([0, 1] * 8)
    weight = compressed_tensors.weight_of_words(four, scales, zeros, groups, shape=(2, 16), bits=4)
    assert torch.equal(weight, (codes - plain[:, groups]) * scales.float()[:, groups])
    # floats of 4 bits
    packed = torch.tensor([[16, 50, 84, 118, 169, 203, 237, 15]], dtype=torch.uint8)
    values = torch.tensor([[0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 0.0]])
    whole = torch.tensor([4.0])
    weight = compressed_tensors.weight_of_4_bit_floats(packed, torch.tensor([[8.0]]).to(torch.float8_e4m3fn), whole)
    assert torch.equal(weight, values * 2)
    exponent = torch.tensor([[126]], dtype=torch.uint8)
    assert torch.equal(compressed_tensors.weight_of_4_bit_floats(packed, exponent, None), values / 2)


GPTQ = {  # gptqmodel 7.7.0: TorchLinear.pack_original of 32 inputs and 32 outputs, dequantize_weight over the scales
    3: (
        ints(
            [1708068054, -1892326907, -1501787366, -1061854108], [1004900825, 1377470103, -150355093, -322514329],
            [-150101171, -694596643, 1188264928, 1087494402],
        ),
        ints([596490012, -924021319, 1841896337], [-479348964, 916222520, -1849091186]),
        [
            [2, -2, -1, 2, -4, 2, -1, 2, 1, 0, 1, 0, 1, -1, 0, 0, 1, 0, 3, 1, -1, -2, -1, -2, -1, 0, 2, 2, -4, 2, 1, 3],
            [2, -3, -3, -2, 3, -1, 2, -2, 4, -2, 3, 0, -2, 2, -2, 1, -1, 0, -3, -2, 2, -1, 4, 3, 0, -2, 2, 1, -2, 2, 2, 3],
            [-2, -1, 0, 1, -4, -3, 3, -1, 2, 0, 2, 1, 2, 2, -4, 2, -3, -3, 0, -1, 3, -3, -4, 3, -1, 3, 1, -3, 1, 1, -3, -2],
            [1, 1, -2, -1, 3, -1, 2, 2, -3, -3, 4, 0, 3, 1, 1, 3, 3, -3, 0, 3, 3, 2, -3, -3, -2, 0, 4, -3, 2, -2, -3, -1],
        ],
    ),
    4: (
        ints(
            [-959396260, 980299788, 1864472947, -1420938103], [2002487929, -1816953521, -523522900, -645107968],
            [1463140233, -547671963, -264275438, 30267406], [-86979195, -322790361, 1119493111, 1077612418],
        ),
        ints(
            [-2022213256, -2022209145, -2005366856, 2003339367], [2004314232, 2022147990, -2020121224, -2005366666]
        ),
        [
            [4, -3, -2, 4, -8, 5, -2, 4, 1, -1, 2, 0, 3, -3, -1, -1, 1, 0, 7, 3, -3, -5, -1, -3, -3, 0, 5, 4, -8, 5, 2, 7],
            [5, -7, -7, -4, 7, -1, 3, -4, 8, -3, 6, 0, -4, 4, -4, 2, -2, -1, -7, -4, 4, -2, 8, 6, 0, -5, 5, 2, -5, 5, 5, 7],
            [-5, -1, 0, 1, -8, -6, 6, -2, 4, 1, 3, 2, 3, 4, -8, 5, -7, -7, 1, -2, 6, -6, -9, 7, -2, 6, 3, -7, 2, 2, -7, -4],
            [3, 2, -3, -3, 7, -2, 4, 4, -6, -7, 8, 0, 6, 2, 3, 6, 7, -6, 1, 6, 6, 5, -6, -6, -5, 1, 9, -6, 5, -4, -7, -2],
        ],
    ),
}  # fmt: skip
ORDER = [1, 1, 0, 1, 0, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 1, 0, 0, 1]  # desc_act


@pytest.mark.parametrize("bits", GPTQ)
def test_gptq_is_what_gptqmodel_dequantizes(bits: int) -> None:
    qweight, qzeros, differences = GPTQ[bits]
    groups, scales = torch.tensor(ORDER), torch.tensor([[0.5, 0.25, 0.1, 1.0], [2.0, 3.0, 0.3, 0.7]]).half()
    expected = torch.tensor(differences) * scales.float()[groups].t()
    assert torch.equal(gptq.weight_of(qweight, qzeros, scales, groups, bits=bits, less=0), expected)
    # the older format stores each zero less one
    ones = sum(1 << (bits * n) for n in range(32 // bits)) if bits == 4 else None
    if ones is not None:
        older = ((qzeros.long() & 0xFFFFFFFF) - ones).int()
        assert torch.equal(gptq.weight_of(qweight, older, scales, groups, bits=bits, less=1), expected)


def in_words(codes: list[int], bits: int) -> list[int]:
    """Codes as one stream of bits in signed words of 32, lowest first, by Python's integers."""
    stream = sum(code << (bits * n) for n, code in enumerate(codes))
    data = stream.to_bytes(len(codes) * bits // 8, "little")
    return [int.from_bytes(data[at : at + 4], "little", signed=True) for at in range(0, len(data), 4)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_a_stream_of_bits(bits: int) -> None:
    codes = torch.randint(1 << bits, (32, 3), generator=torch.Generator().manual_seed(bits))
    words = torch.tensor([in_words(column, bits) for column in codes.t().tolist()], dtype=torch.int32)
    assert torch.equal(unpacked(words, bits, dim=1), codes.t().int())
    assert torch.equal(unpacked(words.t(), bits, dim=0), codes.int())


# folders


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A Llama whose matrices all have 64 inputs or 128."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


Packer = Callable[[Tensor, torch.Generator], tuple[dict[str, Tensor], Tensor]]


def pack_gptq(weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Parts of a random weight of this shape in 4 bits with ordered groups, and that weight."""
    out, width = weight.shape
    codes = torch.randint(16, (width, out), generator=generator)
    zeros, scales = (
        torch.randint(1, 16, (2, out), generator=generator),
        torch.rand(2, out, generator=generator).half() / 50,
    )
    groups = (torch.randperm(width, generator=generator) % 2).int()
    parts = {
        "qweight": torch.tensor([in_words(column, 4) for column in codes.t().tolist()], dtype=torch.int32).t(),
        "qzeros": torch.tensor([in_words(row, 4) for row in (zeros - 1).tolist()], dtype=torch.int32),
        "scales": scales,
        "g_idx": groups,
    }
    return parts, ((codes - zeros[groups.long()]) * scales[groups.long()].float()).t()


def pack_int8(weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """The same in 8 bits as bitsandbytes stores them."""
    codes = torch.randint(-127, 128, weight.shape, generator=generator)
    scales = torch.rand(len(weight), generator=generator) / 5
    parts = {"weight": codes.to(torch.int8), "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, codes * (scales[:, None] / 127)


def pack_torchao(weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """The same as torchao stores them, in groups of 32."""
    codes = torch.randint(-127, 128, weight.shape, generator=generator)
    scales = torch.rand(len(weight), weight.shape[1] // 32, generator=generator) / 900
    parts = {"_weight_qdata": codes.to(torch.int8), "_weight_scale": scales}
    return parts, codes * scales.repeat_interleave(32, 1)


def pack_fp8(weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """The same in 8 bits with a scale for each block."""
    codes = (torch.randn(weight.shape, generator=generator) * 50).to(torch.float8_e4m3fn)
    rows, columns = (-(-n // 32) for n in weight.shape)
    scales = torch.rand(rows, columns, generator=generator) / 900
    wide = scales.repeat_interleave(32, 0).repeat_interleave(32, 1)
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * wide


PACKED: dict[str, tuple[Packer, dict[str, object]]] = {
    "gptq": (pack_gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}),
    "bitsandbytes": (pack_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "torchao": (pack_torchao, {"quant_method": "torchao", "quant_type": {"default": {}}}),
    "fp8": (pack_fp8, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}),
}


def quantized_folder(base: Path, kind: str) -> Path:
    """A copy of the folder with packed layers; in `plain` beside it one with the numbers that they stand for."""
    pack, options = PACKED[kind]
    generator = torch.Generator().manual_seed(0)
    packed, plain = {}, load_file(base / "model.safetensors")
    for name, weight in plain.items():
        if not name.endswith("_proj.weight"):
            packed[name] = weight
            continue
        parts, plain[name] = pack(weight, generator)
        packed |= {name.removesuffix("weight") + end: part.contiguous() for end, part in parts.items()}
    for folder, tensors in ((base.parent / "plain", plain), (base.parent / kind, packed)):
        folder.mkdir()
        save_file(
            {name: x.contiguous() for name, x in tensors.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        values = read_json(base / "config.json")
        write_json(
            folder / "config.json", values if folder.name == "plain" else values | {"quantization_config": options}
        )
    return base.parent / kind


@torch.no_grad()
@pytest.mark.parametrize("kind", PACKED)
def test_a_folder_loads_as_the_model_of_its_numbers(kind: str, base: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, ids = quantized_folder(base, kind), torch.arange(3, 19).view(2, 8)
    expected = AutoModelForCausalLM.from_pretrained(base.parent / "plain", attn_implementation="eager")(ids).logits
    torch.testing.assert_close(load_pretrained(folder)(ids), expected, rtol=1e-4, atol=1e-5)
    assert "no place in this model" not in caplog.text
    assert set(stored_dtypes(str(folder)).values()) == {torch.float32}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gptq", "bitsandbytes"])
def test_the_layers_of_transformers_get_the_same_numbers(kind: str, base: Path) -> None:
    folder, ids = quantized_folder(base, kind), torch.arange(3, 19).view(2, 8)
    model = load_wrapped(str(folder))
    expected = AutoModelForCausalLM.from_pretrained(base.parent / "plain", attn_implementation="eager")(ids).logits
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)
    assert getattr(model.inner.config, "quantization_config", None) is None


@torch.no_grad()
def test_transformers_reads_the_same_numbers_of_fp8(base: Path) -> None:
    folder, ids = quantized_folder(base, "fp8"), torch.arange(3, 19).view(2, 8)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    torch.testing.assert_close(load_pretrained(folder)(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)


# refusals

REFUSED = {
    "unknown": ({"quant_method": "hqq"}, r"quant_method='hqq' is not read .*gptq, awq.*dequantize"),
    "no method": ({"bits": 4}, r"quantization_config: .*bits.* is not read"),
    "no object": ("gptq", r"quantization_config: 'gptq' is not read"),
    "planar": ({"quant_method": "gptq", "checkpoint_format": "gptq_p"}, r"checkpoint_format='gptq_p' .* GPTQModel"),
    "marlin": (
        {"quant_method": "gptq", "checkpoint_format": "marlin"},
        r"checkpoint_format='marlin' of GPTQ is not read",
    ),
    "turned": ({"quant_method": "gptq", "rotation": "hadamard"}, r"rotation='hadamard' of GPTQ"),
    "gemv": ({"quant_method": "awq", "version": "gemv", "bits": 4}, r"version='gemv' .* save it with version=gemm"),
    "sparse": (
        {"quant_method": "compressed-tensors", "format": "marlin-24"},
        r"format='marlin-24' of compressed-tensors",
    ),
    "transform": (
        {"quant_method": "compressed-tensors", "transform_config": {"x": 1}},
        r"transform_config of compressed",
    ),
    "nothing packed": ({"quant_method": "awq"}, r"no tensor beside it is packed so: take it out of config.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_variants_are_refused_in_one_line(case: str, base: Path) -> None:
    options, message = REFUSED[case]
    write_json(base / "config.json", read_json(base / "config.json") | {"quantization_config": options})
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(base)
    assert "\n" not in str(caught.value)


def test_codes_without_scales_and_parts_that_do_not_fit_are_refused(base: Path) -> None:
    folder = quantized_folder(base, "bitsandbytes")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj."
    save_file({k: x for k, x in tensors.items() if k != name + "SCB"}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.weight holds codes \(torch.int8\) without their scales"):
        load_pretrained(folder)
    save_file(tensors | {name + "SCB": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.weight: its packed tensors do not fit"):
        load_pretrained(folder)
